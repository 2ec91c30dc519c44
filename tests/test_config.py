"""Every rule of the configs is told in one sentence that names the field, the rule and the value."""

import dataclasses
from typing import Any

import pytest

from fastchargpt.config import GPTConfig, TrainConfig, config_from_dict
from fastchargpt.errors import ConfigError
from fastchargpt.model import GPT
from fastchargpt.presets import PRESETS, preset


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (dict(n_embd=10, n_head=3), "n_embd must be a multiple of n_head, and 10 is not a multiple of 3"),
        (
            dict(n_head=4, n_embd=64, n_kv_head=3),
            "n_head must be a multiple of n_kv_head, and 4 is not a multiple of 3",
        ),
        (dict(n_layer=0), "n_layer must be at least 1, not 0"),
        (dict(n_layer="4"), "n_layer must be a whole number, not '4'"),
        (dict(n_layer=True), "n_layer must be a whole number, not True"),
        (dict(n_layer=2**63), "n_layer must fit in 64 bits, and 9223372036854775808 does not"),
        (dict(dropout=2**63), "dropout must be a finite number, not 9223372036854775808"),
        (dict(n_layer=10**99), f"n_layer must fit in 64 bits, and 1{'0' * 17}...{'0' * 19} does not"),
        (dict(position=[[[[[[[[[0]]]]]]]]]), "position must be one of learned, rope, not [[[[[[[...]]]]]]]"),
        (dict(norm="x" * 999), f"norm must be one of layernorm, rmsnorm, not '{'x' * 27}...{'x' * 28}'"),
        (dict(dropout=1.0), "dropout must be in [0, 1), not 1.0"),
        (dict(dropout=float("nan")), "dropout must be a finite number, not nan"),
        (dict(bias=1), "bias must be True or False, not 1"),
        (dict(norm="rms"), "norm must be one of layernorm, rmsnorm, not 'rms' (did you mean 'rmsnorm'?)"),
        (dict(head_bias=True), "head_bias=True needs tie_weights=False: a tied head has no bias"),
        (dict(position="rope", n_head=1, n_embd=3), "position='rope' needs an even head_dim, and n_embd / n_head is 3"),
        (dict(logit_softcap=0.0), "logit_softcap must be above 0 or None, not 0.0"),
    ],
)
def test_model_rules(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GPTConfig(**fields)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (dict(batch_size=0), "batch_size must be at least 1, not 0"),
        (dict(learning_rate=-1.0), "learning_rate must not be negative, and it is -1.0"),
        (dict(min_lr=1.0), "min_lr must not exceed learning_rate, and 1.0 is above 0.001"),
        (dict(beta1=1.0), "beta1 must be in [0, 1), not 1.0"),
        (
            dict(schedule="cosin"),
            "schedule must be one of cosine, linear, constant, wsd, not 'cosin' (did you mean 'cosine'?)",
        ),
        (dict(patience=0), "patience must be at least 1 or None, not 0"),
        (dict(target_val_loss="low"), "target_val_loss must be a finite number, not 'low'"),
    ],
)
def test_training_rules(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**fields)
    assert str(caught.value) == sentence


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"GPTConfig has no field 'n_layers' \(did you mean 'n_layer'\?\)"):
        config_from_dict(GPTConfig, {"n_layers": 3})
    with pytest.raises(
        ConfigError, match=r"there is no preset 'shakespear-char' \(did you mean 'shakespeare-char'\?\)"
    ):
        preset("shakespear-char")
    with pytest.raises(ConfigError, match="family must be one of lecture, nanogpt, modern, not 'modem'"):
        GPTConfig.family("modem")  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [GPTConfig(n_kv_head=4), TrainConfig(patience=3)], ids=["GPTConfig", "TrainConfig"])
def test_configs_survive_json_and_are_frozen(config: Any) -> None:
    assert config_from_dict(type(config), dataclasses.asdict(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        # nanoGPT prints 10.65M and 0.80M; GPT-2's sizes as its paper counts them, less biases
        ("shakespeare-char", 10.65),
        ("shakespeare-char-cpu", 0.80),
        ("gpt2", 123.6),
    ],
)
def test_preset_sizes(name: str, millions: float) -> None:
    import torch

    with torch.device("meta"):
        model = GPT(PRESETS[name].model)
    assert model.get_num_params() / 1e6 == pytest.approx(millions, rel=0.006)


def test_every_preset_says_what_it_is() -> None:
    for name, recipe in PRESETS.items():
        assert recipe.about, name
