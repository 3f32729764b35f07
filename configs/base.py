"""Every knob once, with its unit, its paper symbol and its default. Other configs start from here.

    from configs import base
    def get_config() -> ConfigDict:
        config = base.get_config()
        config.audit.num_chunks = 5
        return config

Names and meanings are fixed by `omniopd_jax/config.py`, which refuses unknown keys. Defaults marked [P] are the
paper's, [R] one reader's, the rest are ours (docs/paper_map.md).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            student=dict(
                path="",  # folder in HF layout (config.json, *.safetensors, tokenizer)
                param_dtype="float32",  # what the optimizer updates (master weights)
                compute_dtype="auto",  # "auto": bfloat16 on accelerators, float32 on CPU
                attention="auto",  # of whole sequences: auto | xla | cudnn (GPU) | splash (TPU)
            ),
            lora=dict(
                rank=0,  # 0: train every parameter; > 0: adapters of this rank, the base is the reference
                alpha=32.0,  # the adapter's output is scaled by alpha / rank
                targets=r".*_proj",  # regular expression over linear layers' names, matched whole
                export="merged",  # "merged": one model; "peft": an adapter folder that peft loads
            ),
            reference=dict(
                dtype="same",  # dtype of the frozen copy of the student; "same": as it was loaded
            ),
            teacher=dict(
                kind="local",  # local | self (control: the initial student) | openai | anthropic | gemini | scripted
                path="",  # local: folder in HF layout; openai: folder with its tokenizer, for mode completions
                base_url="",  # openai: an OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1
                model="",  # name asked for; the name answered must agree
                mode="auto",  # auto (probe) | completions | prefill | instruct
                capabilities="",  # JSON file of capability records that override ours
                attention="auto",  # local, self: of whole sequences, as student.attention
                temperature=1.0,  # of the teacher's samples
                top_p=1.0,
                api_key_env="",  # environment variable that holds the key; "": the SDK's own name
                allow_insecure_http=False,  # plain http to hosts other than loopback
                max_concurrency=32,  # requests in flight, all rooms of this process together
                requests_per_minute=0,  # 0: no limit
                tokens_per_minute=0,  # 0: no limit
                request_timeout_s=120.0,  # one attempt
                max_attempts=8,  # attempts a request, the first included
                step_deadline_s=600.0,  # after it, what is missing counts as missing (n < N)
                max_missing_fraction=0.5,  # share of a step's samples that may be missing before the run stops
                max_refusal_fraction=0.5,  # share of a step's samples that may be refused before the run stops
                token_slack=1.5,  # teacher tokens asked for a student token wanted
                cache_path="",  # sqlite file of paid answers; "": WORKDIR/teacher_cache.sqlite; "off": none
                replay_only=False,  # answer from the cache alone; a miss is an error
                dry_run=False,  # print the projected cost and send nothing
                prices="",  # JSON file of prices that override ours
                max_dollars=0.0,  # caps of the whole run; 0: no cap
                max_calls=0,
                max_tokens=0,
                script="noise",  # scripted: "noise" (never agrees) | "missing" (never answers) | file of answers
            ),
            data=dict(
                train="",  # jsonl or parquet of prompts
                eval="",  # held-out rows: in the same layout, or in that of eval.task
                task="",  # a benchmark whose published layout data.train has; "": the columns below
                prompt_field="auto",  # column of the prompt; "auto": prompt | question | problem | messages
                answer_field="auto",  # column of the reference answer; "auto": answer | solution | ground_truth
                use_chat_template=True,  # False: the prompt is the exact text that the model continues
                template_args=dict(enable_thinking=False),  # passed to the chat template
                system_prompt="",
                max_prompt_tokens=1024,  # longer prompts are counted, named and left out
                shuffle=True,
            ),
            rollout=dict(
                batch_size=32,  # B, responses a step
                slots=0,  # responses decoded at once, refilled from the rest of the batch as they end; 0: all of them
                samples_per_prompt=1,  # responses of one prompt; divides batch_size
                max_new_tokens=512,  # T
                temperature=1.0,  # [P] on-policy; other values are a departure and logged as such
                top_k=0,  # keep the k likeliest tokens; 0: all. Like the next two: off is on-policy, on is logged
                top_p=1.0,  # of these keep the fewest that hold this probability; 1: all
                min_p=0.0,  # of these keep those at least this likely beside the likeliest; 0: all
            ),
            audit=dict(
                num_chunks=10,  # M [P]
                chunk_tokens=50,  # C [P]
                num_continuations=10,  # N [P]
                similarity="edit",  # φ [P]; edit | edit_words | exact | rouge1 | rouge_l | embedding, "^p" for a power
                embedding_model="",  # folder or hub name for similarity="embedding"
                positions="peak",  # peak [P] | entropy_weighted | random | lowest (control)
                max_fraction=0.5,  # largest share of a response that may be audited
                entropy_source="decode",  # H_t: decode (taken while sampling, free) | rescore (a pass of its own)
                control="none",  # none | constant | shuffled: scores made one number, or permuted across chunks
            ),
            objective=dict(
                arm="verify",  # verify (OmniOPD) | branch | imitate | sft | opd | grpo | anchor | mixture: docs/arms.md
                weights=dict(verify=0.0, branch=0.0, imitate=0.0, sft=0.0, opd=0.0, grpo=0.0),  # of arm="mixture"
                prior_strength=1.0,  # α [R]
                anchor_weight=0.1,  # β [P]
                anchor_tokens="unaudited",  # unaudited [P] | all
                anchor_estimator="exact",  # exact: KL(ref‖student) [P] | k3: GRPO's KL(student‖ref) of sampled tokens
                normalise="token",  # token | sequence | response (mean of a response, then over responses; no chunks)
                baseline="none",  # verify: none [P] | leave_one_out | teacher_agreement
                num_branches=8,  # G, branch: student continuations a chunk
                repulsion=0.0,  # branch: weight of the mean similarity to the other branches, 0 to 1
                confidence_power=0.0,  # imitate, sft: each token also weighs π_θ(token) to this power; 1 is DFT
                divergence="reverse_kl",  # opd: reverse_kl | forward_kl | jensen_shannon | sampled
                divergence_beta=0.5,  # opd, jensen_shannon: β of GKD
                top_k=0,  # opd: the teacher's k likeliest tokens and one bucket for the rest; 0: full vocabulary
                clip=0.2,  # grpo: ε, the ratio is clipped to [1 − ε, 1 + ε]
                scale_advantage=True,  # grpo: divide by the group's standard deviation; False is Dr. GRPO
            ),
            optimizer=dict(
                learning_rate=1e-6,
                schedule="constant",  # constant | cosine | linear, after the warm-up
                warmup_steps=5,
                b1=0.9,
                b2=0.99,
                eps=1e-8,
                weight_decay=0.0,
                clip_norm=1.0,  # global norm; 0: none
                state_dtype="float32",  # of the first moment
            ),
            train=dict(
                steps=100,
                max_teacher_tokens=0,  # the run is done once the teacher has written so many; 0: `steps` decides
                seed=0,
                updates_per_batch=1,  # μ of GRPO: optimizer updates on one batch
                micro_batch_size=0,  # responses a gradient accumulation step; 0: the whole batch
                remat="none",  # none | full | dots: rematerialisation of the decoder's layers
                block_tokens=512,  # tokens a block of the vocabulary scan, on each share of the batch (data × fsdp)
                list_tokens_from=8192,  # a batch (part) of so many positions is read as a list of what counts; 0: never
                checkpoint_every=20,  # steps; 0: only at the end
                checkpoint_keep=2,  # the newest so many stay
                checkpoint_keep_every=0,  # those of every so many steps stay as well; 0: none
                checkpoint_best="",  # the one with the highest of this metric stays as well, e.g. eval/greedy_accuracy
                audit_log_every=1,  # steps between lines in audits.jsonl and rollouts.jsonl; 0: none
                compilation_cache="auto",  # folder of jax's persistent cache; "auto": the user's cache folder; "off"
            ),
            pipeline=dict(
                micro_batches=1,  # parts of a batch: the teacher works on one while others are sampled and learnt from
                rollouts=0,  # equal rollouts of a batch, a divisor of micro_batches; 0: each as large as all before it
                staleness=0,  # 0: the student samples with the parameters that the step updates; no other value
            ),
            mesh=dict(
                data=1,  # sizes of the mesh axes; one of them may be -1 (the rest of the devices)
                fsdp=-1,
                tensor=1,
            ),
            eval=dict(
                every=0,  # steps; 0: never during training
                problems=256,  # rows of data.eval
                batch_size=256,  # answers decoded side by side; 0: as many as a step of training decodes
                max_new_tokens=0,  # 0: rollout.max_new_tokens
                samples=1,  # k: samples a problem at temperature 1
                task="auto",  # layout and judge: auto (math; a world's own) | gsm8k | math | aime | amc | olympiad |
                # humaneval | mbpp | livecodebench | world
                instruction="auto",  # how a problem is asked: the task's own unless data.system_prompt says; or a text
                sandbox="",  # where programs run: "": nowhere | "local" | http://HOST:PORT of a service
                allow_unsandboxed=False,  # "local" without bubblewrap or namespaces: resource limits alone
                timeout_s=10.0,  # of a program on all of its unit tests, or on each of its inputs
                memory_mb=1024,  # of each process of a program
            ),
            world=dict(
                kind="",  # "": none; arithmetic | rewriting: fill the paths of models and data that are left empty
                path="",  # where it is built; "": WORKDIR/world
                seed=0,
                size=3,  # digits a number (arithmetic) or letters a word (rewriting)
                train_problems=20000,
                validation_problems=0,  # for choices that must not see the held-out problems; validation.jsonl
                eval_problems=1000,
                phrasings=3,  # ways of wording one step
                misconception=0.6,  # student's texts: probability of a forgotten carry, or of a pair taken as sorted
                slip=0.05,  # student's texts: probability that a digit or letter is off by one
                teacher_misconception=0.0,  # the same in the teacher's texts: > 0 makes a teacher that is wrong
                teacher_tokenizer="words",  # words (the student's) | characters: then text alone is shared
                teacher_width=96,
                teacher_layers=3,
                teacher_steps=700,
                student_width=64,
                student_layers=3,
                student_steps=700,
                batch_size=64,
                learning_rate=3e-3,
            ),
            logging=dict(
                tensorboard=False,  # event files in WORKDIR/tensorboard (needs clu and TensorFlow, or tensorboardX)
                wandb="",  # project at Weights & Biases, PROJECT or TEAM/PROJECT; the key is in WANDB_API_KEY
            ),
        )
    )
