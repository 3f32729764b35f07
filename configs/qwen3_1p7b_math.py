"""Qwen3-1.7B on mathematics: every arm and teacher of the paper's main table, and ours.

    python -m experiments.train --config=configs/qwen3_1p7b_math.py:omniopd,qwen3_32b --workdir=runs/row \\
        --config.student.path=Qwen3-1.7B --config.teacher.path=Qwen3-32B \\
        --config.data.train=dapo.parquet --config.data.eval=math500.jsonl

Rows of the paper, Pass@1 in %, mean of MATH-500, AIME-24, AIME-25, AMC-23 and OlympiadBench (`branch` and the other
teachers have none):

                     base    GRPO    SFT     OPD     OmniOPD
    qwen3_32b        51.87   62.41   53.76   61.70   60.67

data.train is DAPO-Math-17K (verl's layout: prompt as messages, reward_model.ground_truth), published as 1.79 million
rows with each prompt about 100 times; equal rows are taken as one. data.eval, measured during the run, is MATH-500. The
other four benchmarks: `experiments.evaluate` (docs/evaluation.md). What ARM and TEACHER may be, and what is our guess:
configs/qwen3.py.

Devices: a TPU v5e slice of 8×8 chips, our guess. `experiments.plan --topology=v5e:8x8` says of omniopd on this file:
25.5 to 27.3 s a step, 1.4 to 1.5 hours for 200, without the teacher and the host; 5.8 of 15.7 GiB a chip.
Teacher: what `--config.teacher.dry_run=True` prints, an estimate for responses of full length.
  omniopd, branch   vLLM 1,280 calls a step; claude 12,800, $44 a step, $8,824 in 200; gemini 2,560, $4.76, $952
  sft               128 calls a step; claude $4.06 a step, $813 in 200; gemini $2.01, $401
  base, grpo, opd   none over the network
Runs of claude and gemini stop at $100 until teacher.max_dollars is raised.
"""

from ml_collections import ConfigDict

from configs import qwen3


def get_config(row: str = "omniopd,qwen3_32b") -> ConfigDict:
    return qwen3.get_config(f"1p7b,math,{row}")
