"""What passes between the rooms: the axis alphabet and the frozen structures.

Every array that crosses a function boundary carries its axes as a suffix, ``entropy_BxT``:

    B  sequences (responses)          V  vocabulary            M  chunk slots a response
    P  prompt tokens (left-padded)    D  model width           C  tokens a chunk
    T  response tokens (right-padded) H  query heads           N  teacher continuations a chunk
    S  = P + T                        K  key/value heads       G  student branches a chunk
    L  layers                         E  head width            R  branches a response (all chunks)
    U  groups of rows                 J  rows a group          W  listed tokens a row

Booleans are called ``is_*`` or ``*_mask``. Token positions of a response are counted from its first
token (0 .. T-1); the same token stands at column ``P + t`` of a packed sequence.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
from flax import struct

Array = Any  # jax.Array or np.ndarray; the border between the two is train/batching.py
PyTree = Any


class InputError(ValueError):
    """Something that the user gave does not fit. The message is one sentence: what, where, what would be right."""

    exit_code = 2


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One task as the host sees it. Never on a device."""

    id: str  # stable across runs: the data file's own id, else "<file stem>:<row>"
    messages: tuple[Message, ...]  # what a chat template renders; a raw prompt is one user message
    is_raw: bool = False  # True: the only message is the exact text that the model continues
    answer: str = ""  # reference answer for rewards and evaluation, "" where the row has none


@struct.dataclass
class PromptBatch:
    """Prompts of one (micro-)batch, tokenised. Row b of every field is the same prompt."""

    prompts: tuple[Prompt, ...] = struct.field(pytree_node=False)  # B entries, repeats allowed
    tokens_BxP: Array  # int32, left-padded
    mask_BxP: Array  # bool, True on real tokens
    sample_index_B: Array  # int32 ≥ 0, global number of this sample in the run: names its random stream


@struct.dataclass
class Rollout:
    """What the student wrote."""

    prompt_tokens_BxP: Array  # int32, left-padded
    prompt_mask_BxP: Array  # bool
    tokens_BxT: Array  # int32, right-padded; the stop token is part of the response
    mask_BxT: Array  # bool, True on response tokens, the stop token included
    logprob_BxT: Array  # float32, nats, of the sampled token at temperature 1; 0 on padding
    is_finished_B: Array  # bool, a stop token was sampled within the length limit
    entropy_BxT: Array | None = None  # float32, nats, of the same logits, full vocabulary; 0 on padding

    def sequence(self) -> tuple[Array, Array]:
        """Packed (tokens_BxS, mask_BxS): prompt, then response."""
        import jax.numpy as jnp

        return (
            jnp.concatenate([self.prompt_tokens_BxP, self.tokens_BxT], axis=1),
            jnp.concatenate([self.prompt_mask_BxP, self.mask_BxT], axis=1),
        )


@struct.dataclass
class Anchors:
    """Where the teacher is asked. Chunk m of response b covers tokens [start, start + C)."""

    start_BxM: Array  # int32, ascending among valid slots; 0 where invalid
    is_valid_BxM: Array  # bool


@struct.dataclass
class Branches:
    """Short continuations that leave a trunk: student samples to be compared with the teacher's text."""

    tokens_BxMxGxC: Array  # int32, right-padded
    mask_BxMxGxC: Array  # bool, True on sampled tokens, the stop token included
    logprob_BxMxGxC: Array  # float32, nats, at temperature 1; 0 on padding


@dataclasses.dataclass(frozen=True)
class Answers:
    """The teacher's own answers to the prompts, in the student's tokens. Host arrays (numpy)."""

    tokens_BxT: np.ndarray  # int32, right-padded; the stop token is part of an answer that ended
    mask_BxT: np.ndarray  # bool; a row without a token: no answer came


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """What the teacher's texts say about the student's, chunk by chunk. Host arrays (numpy)."""

    score_BxMxN: np.ndarray  # float32 in [0, 1], student chunk against continuation; 0 where not received
    is_received_BxMxN: np.ndarray  # bool, the continuation arrived and is usable
    agreement_BxM: np.ndarray  # float32, mean similarity among the teacher's own texts; 0 where n < 2
    branch_score_BxMxG: np.ndarray | None = None  # float32, mean over received texts; 0 where none
    branch_overlap_BxMxG: np.ndarray | None = None  # float32, mean similarity to the other branches
    text_BxMxNxC: np.ndarray | None = None  # int32, the continuations in the student's tokens, the stop token where
    # one ended its answer; right-padded
    text_mask_BxMxNxC: np.ndarray | None = None  # bool
    cut_BxM: np.ndarray | None = None  # int32 ≤ start, where the teacher's texts leave the response

    @property
    def score_sum_BxM(self) -> np.ndarray:
        """k of the paper: the sum of similarities over the continuations received."""
        return self.score_BxMxN.sum(axis=2, dtype=np.float32)

    @property
    def count_BxM(self) -> np.ndarray:
        """n ≤ N, the number of continuations received, float32."""
        return self.is_received_BxMxN.sum(axis=2).astype(np.float32)


@struct.dataclass
class ChunkTargets:
    """The Dirichlet-multinomial target of each audited chunk (paper's π̄ and π̂), no gradient."""

    prior_BxM: Array  # float32 in [0, 1]
    target_BxM: Array  # float32 in [0, 1]
    is_audited_BxM: Array  # bool: a valid anchor with at least one continuation received
    advantage_BxM: Array  # float32, target − baseline: weighs the chunk's tokens; 0 where not audited


@struct.dataclass
class TokenTree:
    """What every arm hands to the one training step: weights on a trunk and on its branches.

    loss = − Σ trunk_weight · log π(trunk token) − Σ branch_weight · log π(branch token)
           + Σ anchor_weight · KL(π_ref ‖ π) + Σ divergence_weight · D(π_teacher, π) − Σ clipped ratio · ratio_weight

    The weights already hold every denominator (tokens or sequences of the *whole* batch), so that the loss of
    a batch is the plain sum over its micro-batches, however it is split. R may be 0.
    """

    prompt_tokens_BxP: Array  # int32, left-padded
    prompt_mask_BxP: Array  # bool
    tokens_BxT: Array  # int32, the trunk: a response, right-padded
    mask_BxT: Array  # bool
    weight_BxT: Array  # float32, 0 on padding
    anchor_weight_BxT: Array  # float32 ≥ 0, β over the denominator where the KL anchor is carried, else 0
    branch_tokens_BxRxC: Array  # int32, right-padded
    branch_mask_BxRxC: Array  # bool
    branch_weight_BxRxC: Array  # float32, 0 on padding
    branch_start_BxR: Array  # int32, a branch sees the prompt and trunk tokens [0, start)
    # What only some arms put on a tree; None: no term.
    divergence_weight_BxT: Array | None = None  # float32 ≥ 0, of the divergence from a white-box teacher
    ratio_weight_BxT: Array | None = None  # float32, advantage over the denominator, of the clipped ratio
    old_logprob_BxT: Array | None = None  # float32, nats, under the student that sampled: the ratio's denominator
    power_BxT: Array | None = None  # float32 ≥ 0: a token also weighs π(token) to this power, without gradient
    branch_power_BxR: Array | None = None  # the same for a branch's tokens
    # What of a tree counts, int32 places in lists (`models.listing.Listing`) that `train.batching.pack` fills in; None:
    # all of it is computed. Both stand together or not at all, and the loss is the same with and without.
    read_UxJxW: Array | None = None  # tokens to read, of P + T + R · (C − 1) a row: trunk, then branches less their end
    scored_UxJxW: Array | None = None  # branch tokens with a weight, of R · C a row


@struct.dataclass
class TrainState:
    """What a step changes, and what a checkpoint of it holds."""

    step: Array  # int32 scalar, finished optimizer steps
    params: PyTree  # what is trained: the full parameters, or the adapters alone
    opt_state: PyTree  # optax state of `params`
