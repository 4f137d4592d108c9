"""A model with random weights, for training from scratch."""

from collections.abc import Mapping
from typing import Any

import torch

from farskip.models.family import Family, families


def family_of_type(model_type: str) -> Family:
    """The family with this transformers model_type.

    Raises:
        ValueError: no such family.
    """
    known = {family.model_type: family for family in families()}
    if model_type not in known:
        raise ValueError(f"model.family={model_type!r} is not supported; use one of {', '.join(known)}")
    return known[model_type]


def build_model(
    model_type: str, settings: Mapping[str, Any], *, vocab_size: int, end_of_document_id: int | None, seed: int
) -> Any:
    """A transformers causal language model with random weights, the same on every rank.

    Args:
        model_type: the family.
        settings: keys of its transformers config.
        vocab_size: entries of the tokenizer.
        end_of_document_id: the token that ends a generation.
        seed: of the weights.

    Raises:
        ValueError: unknown family, or a key that its config does not have.
    """
    import transformers

    family = family_of_type(model_type)
    default = transformers.AutoConfig.for_model(family.model_type)
    unknown = sorted(key for key in settings if not hasattr(default, key) and key not in family.undeclared_config_keys)
    if unknown:
        raise ValueError(f"model.config has keys that {family.model_type} does not know: {', '.join(unknown)}")
    config = transformers.AutoConfig.for_model(
        family.model_type,
        **{
            "vocab_size": vocab_size,
            "bos_token_id": None,
            "eos_token_id": end_of_document_id,
            "pad_token_id": None,
            **settings,
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, family.architecture)(config)
