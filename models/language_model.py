"""A transformers causal language model as the training loop sees it: hidden states, and a head on them."""

from typing import Any

import torch
from torch import nn

from farskip.batch import Batch
from farskip.models.attention_seam import original_implementation
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
        """Hidden states [B, S, D] after the final norm. Attention stays inside the documents of a packed sequence.

        Raises:
            ValueError: flash attention with a packed batch of more than one sequence.
        """
        backbone: Any = backbone_of(self._model)
        self._refuse_crossing(batch)
        packed_masks = family_of_model(self._model).packed_masks
        if packed_masks is not None:
            embedded_BSD = backbone.embed_tokens(batch.input_ids_BS)
            masks = packed_masks(self._model.config, embedded_BSD, batch.position_ids_BS)
            return backbone(
                inputs_embeds=embedded_BSD, attention_mask=masks, position_ids=batch.position_ids_BS, use_cache=False
            ).last_hidden_state
        return backbone(
            input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False
        ).last_hidden_state

    def _refuse_crossing(self, batch: Batch) -> None:
        """transformers tells flash attention where documents end for batches of one sequence only, and silently lets
        attention cross their ends in a larger batch. No mask is at fault: flash attention is given none."""
        name = original_implementation(self._model)
        num_sequences = batch.input_ids_BS.shape[0]
        if "flash" in name and num_sequences > 1 and bool((batch.position_ids_BS[:, 1:] == 0).any()):
            raise ValueError(
                f"attention implementation {name!r} would cross documents in a packed batch of {num_sequences} "
                "sequences: set data.batch_size=1, or load the model with sdpa"
            )

    def head(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Logits [T, V]."""
        return self._model.get_output_embeddings()(hidden_TD)


@torch.no_grad()
def continue_text(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    """Greedy continuation of a prompt. A collective for a parallel model: every rank has to give the same prompt."""
    was_training = model.training
    model.eval()
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    output = model.generate(
        input_ids=ids["input_ids"],
        attention_mask=ids["attention_mask"],
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    model.train(was_training)
    return str(tokenizer.decode(output[0, ids["input_ids"].shape[1] :]))
