"""The paper's table in the small: every arm on the same worlds, at equal teacher tokens and equal updates.

    python -m experiments.compare --config=configs/compare_small.py --workdir=runs/compare --results=docs/results.md
    python -m experiments.compare --config=configs/compare_small.py:rewriting --workdir=runs/compare \
        --results=docs/results.md
    python -m experiments.compare --config=configs/compare_small.py:fast --workdir=runs/compare_fast

Sections: arithmetic (the default), rewriting, one_phrasing, undertrained, characters (a teacher with another
tokenizer), wrong_teacher, sweeps. `,fast` behind a name (or `fast` alone) shrinks everything: it shows that the command
works and measures nothing. `get_config` is the run that all arms share, `get_study` the arms, seeds and searches.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base

SECTIONS = ("arithmetic", "rewriting", "one_phrasing", "undertrained", "characters", "wrong_teacher", "sweeps")
_UPDATES = 100
_TEACHER_TOKENS = 84_000  # what 100 updates of 32 responses with 4 chunks of 8 tokens come to, and a little
_CHARACTERS = 5.0  # characters asked for a word wanted: a word and its space have at most 8, on average 3.4

# With one continuation a chunk, which the budget is spent on, α = 1 makes half of the target the student's own
# confidence. The paper has N = 10: `verify_published`, at the price of a tenth of the responses.
VERIFY = {
    "objective.arm": "verify",
    "audit.positions": "peak",
    "audit.similarity": "edit",
    "objective.anchor_weight": 0.1,
}
BRANCH = {
    "objective.arm": "branch",
    "objective.num_branches": 8,
    "objective.anchor_weight": 0.0,
    "audit.positions": "entropy_weighted",
    "audit.similarity": "edit_words",
}
_REPULSION = BRANCH | {"objective.repulsion": 0.25}
_IMITATE = {"objective.arm": "imitate", "objective.anchor_weight": 0.0, "audit.positions": "entropy_weighted"}
_IMITATE_BOTH = _IMITATE | {"audit.positions": "random", "objective.confidence_power": 0.5}
# An answer has some 34 tokens, four chunks 25 on average: 24 answers cost what 32 audited responses do.
_SFT = {"objective.arm": "sft", "objective.anchor_weight": 0.0, "rollout.batch_size": 24}
_OPD = {"objective.arm": "opd", "objective.anchor_weight": 0.0}
_GRPO = {"objective.arm": "grpo", "objective.anchor_weight": 0.0, "rollout.samples_per_prompt": 8}
_SELF = {"teacher.kind": "self"}


# The arms that lie closest to each other, or to the student before, in the two worlds that ask which is best.
_CLOSE = ("verify_evidence", "branch_repulsion", "sft", "sft_confident", "opd_reverse", "imitate_both", "grpo")
_MORE_SEEDS = (3, 4)
_IN_WRONG = ("verify", "branch_repulsion", "sft", "imitate_both")
_IN_SWEEPS = ("verify", "branch", "sft", "imitate_both")


def _arm(name: str, title: str, *settings: dict[str, Any], rate_of: str = "", is_control: bool = False) -> dict:
    merged: dict[str, Any] = {}
    for part in settings:
        merged |= part
    return dict(name=name, title=title, settings=merged, rate_of=rate_of, is_control=is_control)


def _control(name: str, title: str, rate_of: str, *settings: dict[str, Any]) -> dict:
    return _arm(name, title, *settings, rate_of=rate_of, is_control=True)


# In the order in which they are run: a comparison that is cut short has the main arms.
_MAIN = (
    _arm("verify", "OmniOPD's objective (`verify`), N = 1, α = 1", VERIFY),
    # The paper has N = 10 to α = 1: a tenth of the evidence, not half of it, is the student's own confidence.
    _arm("verify_evidence", "`verify` with the paper's α / N = 0.1", VERIFY, {"objective.prior_strength": 0.1}),
    # Three responses with 4 chunks of 10 continuations cost what 32 responses with one a chunk do.
    _arm(
        "verify_published",
        "`verify` with the paper's N = 10, α = 1, three responses an update",
        VERIFY,
        {"audit.num_continuations": 10, "rollout.batch_size": 3},
    ),
    _arm("branch_repulsion", "`branch`, repulsion 0.25", _REPULSION),
    _arm("sft", "SFT on teacher answers", _SFT),
    _arm("sft_confident", "SFT, weighted by p^0.5", _SFT, {"objective.confidence_power": 0.5}),
    _arm("opd_reverse", "white-box OPD, reverse KL", _OPD, {"objective.divergence": "reverse_kl"}),
    _arm("imitate", "`imitate`", _IMITATE),
    _arm("imitate_both", "`imitate`, random positions, weighted by p^0.5", _IMITATE_BOTH),
    _arm(
        "mixture",
        "mixture: `branch` + 0.2 · `imitate`",
        BRANCH,
        {"objective.arm": "mixture", "objective.weights.branch": 1.0, "objective.weights.imitate": 0.2},
    ),
    _control("branch_self", "`branch`, the student its own teacher", "branch_repulsion", _REPULSION, _SELF),
    _control("verify_self", "`verify`, the student its own teacher", "verify", VERIFY, _SELF),
    _control(
        "imitate_both_self",
        "`imitate`, random positions, p^0.5, the student its own teacher",
        "imitate_both",
        _IMITATE_BOTH,
        _SELF,
    ),
    _control("sft_self", "SFT on the student's own answers", "sft", _SFT, _SELF),
    _arm("branch", "`branch`", BRANCH),
    _arm("grpo", "GRPO (mean over tokens), reward from the reference answer", _GRPO),
)
_VARIANTS = (
    _arm("verify_loo", "`verify`, leave-one-out baseline", VERIFY, {"objective.baseline": "leave_one_out"}),
    _arm("sft_dft", "SFT, weighted by p (DFT)", _SFT, {"objective.confidence_power": 1.0}),
    _arm("imitate_dft", "`imitate`, weighted by p", _IMITATE, {"objective.confidence_power": 1.0}),
    _arm("verify_power", "`verify`, edit similarity to the power 4", VERIFY, {"audit.similarity": "edit^4"}),
    _arm(
        "verify_samples",
        "`verify`, 1 chunk, N = 4",
        VERIFY,
        {"audit.num_chunks": 1, "audit.num_continuations": 4},
    ),
    _arm(
        "verify_agreement",
        "`verify`, teacher-agreement baseline, 1 chunk, N = 4",
        VERIFY,
        {"objective.baseline": "teacher_agreement", "audit.num_chunks": 1, "audit.num_continuations": 4},
    ),
    # A chunk must end within its response, so its last tokens lie in few chunks of 8 and in more of 4.
    _arm(
        "imitate_short",
        "`imitate`, 8 chunks of 4 at random positions",
        _IMITATE,
        {"audit.positions": "random", "audit.num_chunks": 8, "audit.chunk_tokens": 4},
    ),
    _arm("imitate_random", "`imitate`, random positions", _IMITATE, {"audit.positions": "random"}),
    _arm("imitate_confident", "`imitate`, weighted by p^0.5", _IMITATE, {"objective.confidence_power": 0.5}),
    _arm(
        "mixture_both",
        "mixture: `branch` + `imitate`, random positions, p^0.5",
        BRANCH,
        {"objective.arm": "mixture", "objective.weights.branch": 1.0, "objective.weights.imitate": 1.0},
        {"audit.positions": "random", "objective.confidence_power": 0.5},
    ),
    _arm("opd_forward", "white-box OPD, forward KL", _OPD, {"objective.divergence": "forward_kl"}),
    _arm(
        "mixture_even",
        "mixture: `branch` + `imitate`",
        BRANCH,
        {"objective.arm": "mixture", "objective.weights.branch": 1.0, "objective.weights.imitate": 1.0},
    ),
)
_CONTROLS = (
    _control("anchor", "the anchor alone", "verify", VERIFY, {"objective.arm": "anchor"}),
    _control(
        "verify_evidence_self",
        "`verify` with α / N = 0.1, the student its own teacher",
        "verify_evidence",
        VERIFY,
        {"objective.prior_strength": 0.1},
        _SELF,
    ),
    _control("constant", "`verify`, constant target", "verify", VERIFY, {"audit.control": "constant"}),
    _control("shuffled", "`verify`, scores shuffled across chunks", "verify", VERIFY, {"audit.control": "shuffled"}),
    _control("random", "`verify`, random positions", "verify", VERIFY, {"audit.positions": "random"}),
    _control("lowest", "`verify`, positions of lowest entropy", "verify", VERIFY, {"audit.positions": "lowest"}),
    _control("no_anchor", "`verify`, no anchor", "verify", VERIFY, {"objective.anchor_weight": 0.0}),
    _control("anchor_all", "`verify`, anchor on all tokens", "verify", VERIFY, {"objective.anchor_tokens": "all"}),
    _control("branch_random", "`branch`, random positions", "branch", BRANCH, {"audit.positions": "random"}),
    _control("branch_lowest", "`branch`, lowest entropy", "branch", BRANCH, {"audit.positions": "lowest"}),
    _control("branch_shuffled", "`branch`, scores shuffled", "branch", BRANCH, {"audit.control": "shuffled"}),
)
_SWEEPS = (
    *(_control(f"chunks_{m}", f"`verify`, M = {m}", "verify", VERIFY, {"audit.num_chunks": m}) for m in (1, 2)),
    *(_control(f"length_{c}", f"`verify`, C = {c}", "verify", VERIFY, {"audit.chunk_tokens": c}) for c in (4, 16)),
    *(_control(f"samples_{n}", f"`verify`, N = {n}", "verify", VERIFY, {"audit.num_continuations": n}) for n in (2, 4)),
    *(
        _control(f"prior_{alpha}", f"`verify`, α = {alpha}", "verify", VERIFY, {"objective.prior_strength": alpha})
        for alpha in (0.1, 5.0)
    ),
    *(
        _control(f"anchor_{beta}", f"`verify`, β = {beta}", "verify", VERIFY, {"objective.anchor_weight": beta})
        for beta in (0.01, 0.5)
    ),
    *(
        _control(f"phi_{name}", f"`verify`, φ = {name}", "verify", VERIFY, {"audit.similarity": name})
        for name in ("exact", "edit_words", "rouge1")
    ),
    *(
        _control(f"branches_{g}", f"`branch`, G = {g}", "branch", BRANCH, {"objective.num_branches": g})
        for g in (2, 4, 16)
    ),
    *(
        _control(f"repulsion_{part}", f"`branch`, repulsion {part}", "branch", BRANCH, {"objective.repulsion": part})
        for part in (0.5, 1.0)
    ),
    _control("branch_phi_edit", "`branch`, φ = edit", "branch", BRANCH, {"audit.similarity": "edit"}),
    _control(
        "sft_long",
        "SFT, five times the updates and teacher tokens",
        "sft",
        _SFT,
        {"train.steps": 5 * _UPDATES, "train.max_teacher_tokens": 5 * _TEACHER_TOKENS},
    ),
    _control("branch_anchor", "`branch`, β = 0.1", "branch", BRANCH, {"objective.anchor_weight": 0.1}),
    *(
        _control(
            f"imitate_power_{power}",
            f"`imitate`, random positions, weighted by p^{power}",
            "imitate_both",
            _IMITATE_BOTH,
            {"objective.confidence_power": power},
        )
        for power in (0.25, 0.75, 1.0)
    ),
    *(
        _control(
            f"imitate_{m}_{c}",
            f"`imitate`, random positions, p^0.5, {m} chunks of {c}",
            "imitate_both",
            _IMITATE_BOTH,
            {"audit.num_chunks": m, "audit.chunk_tokens": c},
        )
        for m, c in ((2, 16), (8, 4))
    ),
)
_TITLES = {
    "arithmetic": ("Three-digit addition", "A student that forgets carries; steps worded in one of three ways."),
    "rewriting": ("Symbolic rewriting", "A student that sorts pairs before it looks them up; three wordings a step."),
    "one_phrasing": ("Addition, one wording", "As the first, but with one wording a step: no fork is one of wording."),
    "undertrained": ("Addition, an undertrained student", "The student's texts are faultless, but it saw few of them."),
    "characters": ("Addition, a teacher that reads characters", "Teacher and student share text and no tokenizer."),
    "wrong_teacher": ("Addition, a wrong teacher", "The teacher forgets carries as well: what is learned is its text."),
    "sweeps": ("Addition, one knob at a time", "Each row is `verify`, `branch` or `imitate` with one knob changed."),
}
_CLAIMS = (
    *(
        dict(text=f"The paper: OmniOPD ({name}) {claim}", better=arm, worse=worse)
        for arm, name in (
            ("verify", "N = 1, α = 1"),
            ("verify_evidence", "N = 1, α = 0.1"),
            ("verify_published", "N = 10, α = 1"),
        )
        for claim, worse in (
            ("improves the student", "before"),
            ("is ahead of white-box OPD", "opd_reverse"),
            ("is ahead of SFT", "sft"),
            ("is, with stronger teachers, ahead of GRPO", "grpo"),
        )
    ),
    dict(text="The paper: white-box OPD is ahead of SFT", better="opd_reverse", worse="sft"),
    dict(text="The paper's ablation: peaks of entropy are ahead of random positions", better="verify", worse="random"),
    dict(text="The paper's ablation: the anchor helps", better="verify", worse="no_anchor"),
    dict(text="More than sharpening: `verify` beats its self-teacher", better="verify", worse="verify_self"),
    dict(text="`verify` beats its self-teacher at α / N = 0.1", better="verify_evidence", worse="verify_evidence_self"),
    dict(text="Scores matter: `verify` is ahead of a constant target", better="verify", worse="constant"),
    dict(text="Scores matter: `verify` is ahead of shuffled scores", better="verify", worse="shuffled"),
    dict(text="A baseline helps `verify`", better="verify_loo", worse="verify"),
    dict(text="More than sharpening: `branch` beats its self-teacher", better="branch_repulsion", worse="branch_self"),
    dict(text="More than sharpening: SFT beats its self-teacher", better="sft", worse="sft_self"),
    dict(
        text="More than sharpening: `imitate`, random positions, p^0.5, beats its self-teacher",
        better="imitate_both",
        worse="imitate_both_self",
    ),
    dict(text="SFT weighted by p^0.5 is ahead of SFT", better="sft_confident", worse="sft"),
    dict(text="SFT weighted by p^0.5 is ahead of white-box OPD", better="sft_confident", worse="opd_reverse"),
    dict(text="`branch` with repulsion is ahead of `verify`", better="branch_repulsion", worse="verify"),
    dict(text="`branch` with repulsion is ahead of SFT", better="branch_repulsion", worse="sft"),
    dict(text="`branch` with repulsion is ahead of white-box OPD", better="branch_repulsion", worse="opd_reverse"),
    dict(text="`branch` with repulsion is ahead of GRPO", better="branch_repulsion", worse="grpo"),
    dict(text="`branch` is ahead of `branch` with repulsion", better="branch", worse="branch_repulsion"),
    dict(text="`branch` is ahead of `imitate`", better="branch", worse="imitate"),
    dict(text="The mixture is ahead of `branch` with repulsion", better="mixture", worse="branch_repulsion"),
    dict(text="The mixture is ahead of SFT", better="mixture", worse="sft"),
    dict(text="The mixture is ahead of white-box OPD", better="mixture", worse="opd_reverse"),
    dict(text="`imitate` in short chunks at random positions is ahead of SFT", better="imitate_short", worse="sft"),
    dict(text="`imitate` in short chunks is ahead of white-box OPD", better="imitate_short", worse="opd_reverse"),
    *(
        dict(text=f"{name}, random positions, p^0.5, is ahead of {other}", better=arm, worse=worse)
        for arm, name in (("imitate_both", "`imitate`"), ("mixture_both", "`branch` + `imitate`"))
        for worse, other in (("sft", "SFT"), ("sft_confident", "SFT with p^0.5"), ("opd_reverse", "white-box OPD"))
    ),
    dict(text="`imitate` at entropy-weighted positions is ahead of random", better="imitate", worse="imitate_random"),
    dict(text="`branch` at entropy-weighted positions is ahead of random ones", better="branch", worse="branch_random"),
)  # fmt: skip


def get_config(argument: str = "arithmetic") -> ConfigDict:
    section, is_fast = _parsed(argument)
    config = base.get_config()
    config.world.update(kind="arithmetic", validation_problems=500, teacher_width=64, teacher_steps=1400, batch_size=32)
    config.teacher.token_slack = 1.0  # one tokenizer: a token asked for is a token used
    config.rollout.update(batch_size=32, max_new_tokens=48)
    config.audit.update(num_chunks=4, chunk_tokens=8, num_continuations=1, max_fraction=1.0)
    config.optimizer.update(warmup_steps=5, clip_norm=1.0)
    config.train.update(steps=_UPDATES, max_teacher_tokens=_TEACHER_TOKENS, checkpoint_every=0, audit_log_every=0)
    config.eval.update(problems=250, batch_size=500, task="world")
    if section == "rewriting":
        config.world.update(kind="rewriting", size=5, train_problems=8000)
    elif section == "one_phrasing":
        config.world.phrasings = 1
    elif section == "undertrained":
        config.world.update(misconception=0.0, slip=0.0, student_steps=360)
    elif section == "characters":
        config.world.teacher_tokenizer = "characters"
        config.teacher.token_slack = _CHARACTERS
        config.train.max_teacher_tokens = int(_CHARACTERS * _TEACHER_TOKENS)
    elif section == "wrong_teacher":
        config.world.teacher_misconception = 0.6
        config.world.misconception = 0.2
    if is_fast:
        config.world.update(size=min(config.world.size, 3), train_problems=250, validation_problems=30)
        config.world.update(eval_problems=40, teacher_steps=60, student_steps=40)
        config.train.update(steps=4, max_teacher_tokens=0)
        config.eval.update(problems=30, batch_size=40)
    return config


def get_study(argument: str = "arithmetic") -> dict[str, Any]:
    section, is_fast = _parsed(argument)
    arms = {
        "arithmetic": (*_MAIN, *_VARIANTS, *_CONTROLS),
        "wrong_teacher": tuple(arm for arm in _MAIN if arm["name"] in _IN_WRONG),
        "sweeps": (*(arm for arm in _MAIN if arm["name"] in _IN_SWEEPS), *_SWEEPS),
    }.get(section, _MAIN)
    if section == "characters":
        arms = tuple(_of_characters(arm) for arm in arms if arm["settings"]["objective.arm"] != "opd")
    if section in ("arithmetic", "rewriting") and not is_fast:
        arms = tuple(arm | dict(more_seeds=_MORE_SEEDS) if arm["name"] in _CLOSE else arm for arm in arms)
    names = {arm["name"] for arm in arms} | {"before"}
    title, about = _TITLES[section]
    study = dict(
        name=f"{SECTIONS.index(section) + 1}-{section}",
        title=title,
        about=about,
        seeds=(0, 1, 2),
        learning_rates=(5e-5, 2e-4, 8e-4),
        extensions=1,
        curve_every=20,
        curve_problems=250,
        kl_problems=250,
        arms=arms,
        claims=tuple(claim for claim in _CLAIMS if {claim["better"], claim["worse"]} <= names),
        references=tuple(name for name in ("before", "sft", "opd_reverse") if name in names),
        curves=tuple(arm["name"] for arm in _MAIN if arm["name"] in names and not arm["is_control"]),
    )
    if is_fast:
        chosen = tuple(arm for arm in arms if arm["name"] in ("verify", "branch_repulsion", "sft", "branch_self"))
        names = {arm["name"] for arm in chosen} | {"before"}
        study |= dict(
            name=f"{study['name']}-fast",
            seeds=(0, 1),
            learning_rates=(2e-4,),
            curve_every=2,
            curve_problems=30,
            kl_problems=30,
            arms=chosen,
            claims=tuple(claim for claim in study["claims"] if {claim["better"], claim["worse"]} <= names),
            references=tuple(name for name in study["references"] if name in names),
            curves=tuple(name for name in study["curves"] if name in names),
        )
    return study


def _of_characters(arm: dict[str, Any]) -> dict[str, Any]:
    """Tokens are counted in characters: an answer has some 120, four chunks with their slack 150 on average."""
    if arm["settings"]["objective.arm"] == "sft":
        return arm | dict(settings=arm["settings"] | {"rollout.batch_size": 32})
    return arm


def _parsed(argument: str) -> tuple[str, bool]:
    names = argument.split(",")
    is_fast = "fast" in names
    sections = [name for name in names if name != "fast"] or ["arithmetic"]
    if len(sections) > 1 or sections[0] not in SECTIONS:
        raise ValueError(f"{argument!r} is no section: expected one of {', '.join(SECTIONS)}, or with ,fast behind it.")
    return sections[0], is_fast
