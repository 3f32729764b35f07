"""Qwen3-4B on code: every arm and teacher of the paper's main table, and ours.

    python -m experiments.train --config=configs/qwen3_4b_code.py:omniopd,qwen3_32b --workdir=runs/row \\
        --config.student.path=Qwen3-4B --config.teacher.path=Qwen3-32B \\
        --config.data.train=mbpp.jsonl --config.data.eval=HumanEval.jsonl.gz

Rows of the paper, Pass@1 in %, mean of its code benchmarks, which we could not read (all other rows have none):

                     SFT     OPD     OmniOPD
    qwen3_32b        62.03   65.26   63.78

data.train is MBPP, our guess: the paper does not say what it trains on. data.eval, measured during the run, is
HumanEval, whose programs run in a sandbox on this machine (docs/evaluation.md). What ARM and TEACHER may be, and what
is our guess: configs/qwen3.py.

Devices: a TPU v5e slice of 8×8 chips, a guess. `experiments.plan --topology=v5e:8x8` says of omniopd at the same sizes
(configs/qwen3_4b_math.py): 53.7 to 58.0 s a step, 3.0 to 3.2 hours for 200, without the teacher and the host; 10.2 of
15.7 GiB a chip.
Teacher: what `--config.teacher.dry_run=True` prints, an estimate for responses of full length.
  omniopd, branch   vLLM 1,280 calls a step; claude 12,800, $44 a step, $8,824 in 200; gemini 2,560, $4.76, $952
  sft               128 calls a step; claude $4.06 a step, $813 in 200; gemini $2.01, $401
  base, grpo, opd   none over the network
Runs of claude and gemini stop at $100 until teacher.max_dollars is raised.
"""

from ml_collections import ConfigDict

from configs import qwen3


def get_config(row: str = "omniopd,qwen3_32b") -> ConfigDict:
    return qwen3.get_config(f"4b,code,{row}")
