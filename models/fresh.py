"""A model with random weights, for training from scratch."""

from collections.abc import Mapping
from typing import Any

from farskip.models.family import Family, families
from farskip.models.fresh_slices import fresh_model
from farskip.models.rank_slices import RankSlices

_SIZES = ("num_hidden_layers", "_size", "_heads", "_dim", "_rank")
"""How keys of a transformers config end that say how large a model is; torch's own words for one below 1 name none."""


def family_of_type(name: str) -> Family:
    """The family with this name, which is its transformers model_type unless another family has that.

    Raises:
        ValueError: no such family.
    """
    known = {family.name: family for family in families()}
    if name not in known:
        raise ValueError(f"model.family={name!r} is not supported; use one of {', '.join(known)}")
    return known[name]


def check_settings(model_type: str, settings: Mapping[str, Any]) -> None:
    """Refuse a family and keys of a config that do not exist, and sizes that cannot be, before anything is built.

    Raises:
        ValueError: unknown family, a key that its config does not have, or a size below 1.
    """
    import transformers

    family = family_of_type(model_type)
    default = transformers.AutoConfig.for_model(family.model_type)
    unknown = sorted(key for key in settings if not hasattr(default, key) and key not in family.undeclared_config_keys)
    if unknown:
        raise ValueError(f"model.config has keys that {family.name} does not know: {', '.join(unknown)}")
    for key, value in settings.items():
        if key.endswith(_SIZES) and isinstance(value, int) and value < 1:
            raise ValueError(f"model.config.{key}={value} is too small; use at least 1")


def build_model(
    model_type: str,
    settings: Mapping[str, Any],
    *,
    vocab_size: int,
    end_of_document_id: int | None,
    seed: int,
    here: RankSlices | None = None,
) -> Any:
    """A transformers causal language model with random weights, the same on every rank.

    Args:
        model_type: the family.
        settings: keys of its transformers config.
        vocab_size: entries of the tokenizer.
        end_of_document_id: the token that ends a generation.
        seed: of the weights.
        here: this rank's slices, of which alone it gets memory (`farskip.models.fresh_slices`); None: the whole model.

    Raises:
        ValueError: unknown family, a key that its config does not have, a size below 1, or values that do not go
            together.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    check_settings(model_type, settings)
    family = family_of_type(model_type)
    own = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": end_of_document_id, "pad_token_id": None}
    try:
        config = transformers.AutoConfig.for_model(family.model_type, **{**own, **settings})
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"model.config does not make a {family.name}: {' '.join(str(error).split())}") from error
    _check_sizes(config)
    return fresh_model(family, config, seed, here or RankSlices())


def _check_sizes(config: Any) -> None:
    """What transformers would only find out in the middle of the first step, in words of its own."""
    heads, shared_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % shared_heads:
        raise ValueError(
            f"model.config.num_attention_heads={heads} is no multiple of num_key_value_heads={shared_heads}: change one"
        )
    experts = next((getattr(config, key) for key in ("num_local_experts", "num_experts") if hasattr(config, key)), None)
    if experts is None:
        return  # a dense family
    chosen = config.num_experts_per_tok
    if not 1 <= chosen <= experts:
        raise ValueError(
            f"model.config.num_experts_per_tok={chosen} must be at least 1 and at most the number of experts, {experts}"
        )
