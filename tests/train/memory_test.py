"""Memory that does not know the vocabulary: the compiler's own figures at V = 151,936, nothing is computed."""

import jax
import pytest

from omniopd_jax import models
from omniopd_jax.config import MeshConfig
from omniopd_jax.plan import programs
from omniopd_jax.rollout import sampler
from omniopd_jax.rollout.rescoring import rescore
from omniopd_jax.rollout.sampling import SamplingRule
from omniopd_jax.train import sharding
from omniopd_jax.types import Rollout
from tests.train.conftest import tiny_config

VOCABULARY, WIDTH, ROWS, BLOCK = 151_936, 16, 2, 64
SHORT, LONG = 256, 1024  # tokens a response
LOGITS = 4 * VOCABULARY  # bytes of one token's logits in float32
# So many times the logits of a block may exist at once: both sides of the KL, forward and backward, and the weights'
# gradient, which is as large as the unembedding.
BLOCKS = 6


def shapes(tokens):
    decoder = models.decoder_config(
        dict(
            architectures=["Qwen3ForCausalLM"], vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, head_dim=8, intermediate_size=16, rms_norm_eps=1e-6,
            tie_word_embeddings=True, max_position_embeddings=4096,
        )
    )  # fmt: skip
    config = tiny_config(
        **{
            "rollout.batch_size": ROWS,
            "rollout.max_new_tokens": tokens,
            "data.max_prompt_tokens": 16,
            "train.block_tokens": BLOCK,
            "train.remat": "full",
        }
    )
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    return programs.run_shapes(config, decoder, mesh, "float32")


def lowered(kind, tokens):
    given = shapes(tokens)
    if kind == "step":
        return programs.lower_step(given, ROWS)

    def array(*shape, dtype="float32"):
        return jax.ShapeDtypeStruct((ROWS, *shape), dtype)

    prompts = (array(16, dtype="int32"), array(16, dtype="bool"))
    if kind == "score":
        responses = (array(tokens, dtype="int32"), array(tokens, dtype="bool"), array(tokens))
        rollout = Rollout(*prompts, *responses, is_finished_B=array(dtype="bool"), entropy_BxT=array(tokens))
        return rescore.lower(given.student, rollout, block_tokens=BLOCK)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), ROWS))
    rule = SamplingRule(stop_tokens=(1,), banned_tokens=(0,))
    state = jax.eval_shape(
        lambda *inputs: sampler.read_prompts(*inputs, max_new_tokens=tokens, rule=rule), given.student, *prompts, keys
    )
    return sampler.decode_segment.lower(given.student, state, keys, until=tokens, rule=rule)


def temporaries(kind, tokens):
    # The memory is planned before the machine's instructions are chosen: the cheapest ones do.
    compiled = lowered(kind, tokens).compile(compiler_options={"xla_backend_optimization_level": 0})
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("kind", ["step", "score", "decode"])
def test_temporaries_grow_with_the_block_and_not_with_the_response(kind):
    short, long = temporaries(kind, SHORT), temporaries(kind, LONG)
    print(f"{kind}: {SHORT} tokens {short / 2**20:.1f} MiB, {LONG} tokens {long / 2**20:.1f} MiB")  # for docs/scale.md
    everything = ROWS * (LONG - SHORT) * LOGITS  # what logits of the longer responses would add
    assert long - short < everything / 20, (short, long)
    assert long < BLOCKS * BLOCK * LOGITS + 40 * WIDTH * VOCABULARY, long / (BLOCK * LOGITS)
