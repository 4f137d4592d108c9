"""A transformers causal language model as the training loop sees it: hidden states, and a head on them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from farskip.batch import Batch
from farskip.models.attach import attachment_of
from farskip.models.attention_seam import is_flash, original_implementation
from farskip.models.family import backbone_of, family_of_model


class HFLanguageModel:
    """Implements `farskip.training_protocols.LanguageModel`.

    Args:
        model: a transformers causal language model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.module = model
        self._model: Any = model

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Hidden states [B, S, D] after the final norm. Attention stays inside the documents of a packed sequence."""
        backbone: Any = backbone_of(self._model)
        arguments: dict[str, Any] = {"position_ids": batch.position_ids_BS, "use_cache": False}
        if is_flash(original_implementation(self._model)):
            arguments |= _bounds(batch.position_ids_BS)
        packed_masks = family_of_model(self._model).packed_masks
        if packed_masks is None:
            return backbone(input_ids=batch.input_ids_BS, **arguments).last_hidden_state
        embedded_BSD = backbone.embed_tokens(batch.input_ids_BS)
        masks = packed_masks(self._model.config, embedded_BSD, batch.position_ids_BS)
        return backbone(inputs_embeds=embedded_BSD, attention_mask=masks, **arguments).last_hidden_state

    def head(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Logits [T, V]."""
        return self._model.get_output_embeddings()(hidden_TD)


def _bounds(position_ids_BS: torch.Tensor) -> dict[str, Any]:
    """Where documents begin and end in the flattened batch, as transformers hands it to flash attention.

    By itself transformers asks the position ids, in every layer, and each time the host waits for the accelerator; and
    for a batch of one sequence only: in a larger one attention would silently cross the documents' ends.
    """
    starts_BS = position_ids_BS == 0
    starts_BS[:, 0] = True
    starts_N = starts_BS.flatten().nonzero().flatten()
    bounds_N = F.pad(starts_N, (0, 1), value=starts_BS.numel()).int()
    longest = int(bounds_N.diff().max())
    return {"cu_seq_lens_q": bounds_N, "cu_seq_lens_k": bounds_N, "max_length_q": longest, "max_length_k": longest}


@torch.no_grad()
def continue_text(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    """Greedy continuation of a prompt. A collective over all ranks for a parallel model; they need not end together."""
    was_training = model.training
    model.eval()
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    output = model.generate(
        input_ids=ids["input_ids"],
        attention_mask=ids["attention_mask"],
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
        synced_gpus=_is_spread(model) or None,
    )
    model.train(was_training)
    return str(tokenizer.decode(output[0, ids["input_ids"].shape[1] :]))


def _is_spread(model: Any) -> bool:
    """Whether other ranks need this one's forward passes, also after its own text has come to an end."""
    attachment = attachment_of(model)
    return attachment is not None and attachment.mesh is not None and attachment.mesh.size() > 1
