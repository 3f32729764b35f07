"""config.json → decoder config: both spellings, the defaults of silent fields, and one sentence for what is wrong."""

import copy
import dataclasses
import json

import jax
import pytest

from omniopd_jax import models
from omniopd_jax.models import decoder
from omniopd_jax.models.families import FAMILIES, hf_config
from omniopd_jax.models.parameters import AXES, leaf, parameter_table
from omniopd_jax.types import InputError
from tests.models import parity


@pytest.mark.parametrize("case", parity.CASES, ids=lambda case: case.name)
def test_both_spellings_of_a_config_mean_the_same(case):
    """`parity.CASES` are in the older spelling; what transformers writes of them is in the newer one."""
    from transformers import AutoConfig

    older = parity.case_config(case)
    newer_values = AutoConfig.for_model(case.model_type, **copy.deepcopy(case.values)).to_dict()
    assert "rope_parameters" in newer_values
    assert "rope_theta" not in newer_values
    newer = models.decoder_config(newer_values | {"architectures": [older.architecture]})
    assert dataclasses.replace(newer, source="") == dataclasses.replace(older, source="")


@pytest.mark.parametrize("architecture", FAMILIES)
def test_fields_that_a_config_leaves_out_are_transformers_defaults(architecture):
    from transformers import AutoConfig

    sizes = dict(vocab_size=64, hidden_size=512, intermediate_size=64, num_hidden_layers=8, num_attention_heads=32)
    theirs = AutoConfig.for_model(FAMILIES[architecture].model_type, **sizes)
    ours = models.decoder_config(sizes | {"architectures": [architecture]})
    explicit = models.decoder_config(theirs.to_dict() | {"architectures": [architecture]})
    unlike = {"source", "eos_token_ids", "bos_token_id", "pad_token_id"}
    for field in dataclasses.fields(ours):
        if field.name not in unlike:
            assert getattr(ours, field.name) == getattr(explicit, field.name), field.name


def test_layer_patterns():
    smollm3 = parity.case_config(parity.CASES[6])
    assert [smollm3.ropes[i].kind for i in smollm3.rope_index_L] == ["default", "none"]
    gemma3 = parity.case_config(parity.CASES[8])
    assert gemma3.window_L == (5, 0)
    assert [gemma3.ropes[i].theta for i in gemma3.rope_index_L] == [1e4, 1e6]
    qwen2 = parity.case_config(parity.CASES[0])
    assert qwen2.window_L == (0, 6)


def test_the_config_is_written_back_as_it_was_read():
    values = dict(parity.CASES[1].values, architectures=["Qwen3ForCausalLM"], model_type="qwen3", something_new=[1, 2])
    config = models.decoder_config(dict(values, torch_dtype="float16"))
    assert hf_config(config, "bfloat16") == values | {"dtype": "bfloat16"}
    assert models.decoder_config(hf_config(config, "float16")).ropes == config.ropes


def test_token_ids():
    config = models.decoder_config(_qwen3(eos_token_id=[5, 6], pad_token_id=None))
    assert config.eos_token_ids == (5, 6)
    assert config.pad_token_id is None
    assert models.decoder_config(_qwen3(eos_token_id=None)).eos_token_ids == ()


@pytest.mark.parametrize("case", parity.CASES, ids=lambda case: case.name)
def test_the_table_names_exactly_what_the_decoder_declares(case):
    config = parity.case_config(case)
    module = decoder.Decoder(config)
    tokens = jax.ShapeDtypeStruct((1, 1), "int32")
    keys = decoder.Keys(jax.ShapeDtypeStruct((1, 1), "bool"), tokens, decoder.is_windowed(config))
    declared = jax.eval_shape(module.init, jax.random.key(0), tokens, tokens, decoder.CausalContext(keys, False))[
        "params"
    ]
    table = parameter_table(config)
    assert len(table) == len(jax.tree.leaves(declared))
    for row in table:
        assert leaf(declared, row.path).shape == row.shape
        assert len(row.axes) == len(row.shape)
        assert set(row.axes) <= set(AXES)


def test_logical_axes_have_the_tree_of_the_parameters():
    model = parity.tiny_model("Qwen3-MoE")
    axes = models.logical_axes(model)
    ranks = jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple))
    assert ranks == jax.tree.map(lambda x: x.ndim, model.params)
    assert axes["layers"]["attention"]["q_proj"]["kernel"] == ("layers", "embed", "heads", "head_dim")
    assert axes["layers"]["mlp"]["down_proj"] == ("layers", "experts", "mlp", "embed")


def _qwen3(**changes):
    return dict(parity.CASES[1].values, architectures=["Qwen3ForCausalLM"]) | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(architectures=["MambaForCausalLM"]), "'MambaForCausalLM'; those known here are Qwen2ForCausalLM, Qwen3"),
        (dict(architectures=None), "architecture None"),
        (dict(hidden_size=None), "has no hidden_size"),
        (dict(rope_scaling=dict(rope_type="longrope", factor=2.0)), "'longrope'; known are default, linear"),
        (dict(rope_scaling=dict(rope_type="linear")), "without its factor"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "without its low_freq_factor"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(rope_parameters=dict(full_attention=dict(rope_theta=1e4))), "nests rope_parameters"),
        (dict(num_key_value_heads=3), "num_key_value_heads=3"),
        (dict(head_dim=15), "even number"),
        (dict(hidden_act="relu"), "activation 'relu'"),
        (dict(quantization_config=dict(bits=4)), "quantised"),
        (dict(architectures=["Qwen3MoeForCausalLM"], mlp_only_layers=[0]), "mixes dense and routed"),
        (dict(architectures=["Gemma3ForCausalLM"], use_bidirectional_attention=True), "bidirectional"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_sentence(changes, message):
    with pytest.raises(models.ModelError, match=message) as error:
        models.decoder_config(_qwen3(**changes))
    assert str(error.value).endswith(".")


def test_a_model_that_cannot_be_read_is_bad_input():
    """Commands print such errors as one sentence and end with code 2; anything else is a traceback."""
    assert issubclass(models.ModelError, InputError)
    with pytest.raises(InputError, match="architecture 'BertModel'") as error:
        models.decoder_config(_qwen3(architectures=["BertModel"]))
    assert error.value.exit_code == 2


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(models.ModelError, match="nowhere is not a folder"):
        models.read_config(tmp_path / "nowhere")
    with pytest.raises(models.ModelError, match=r"holds no config\.json"):
        models.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(models.ModelError, match="not valid JSON"):
        models.read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(models.ModelError, match="not an object of settings"):
        models.read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(_qwen3()))
    assert models.read_config(tmp_path).num_layers == 2


def test_an_adapter_folder_says_that_it_is_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(models.ModelError, match=r"holds a LoRA adapter .* merge it into its base model first"):
        models.read_config(tmp_path)
