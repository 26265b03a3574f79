#!/bin/sh
# The three steps of RLHF, and DPO on the same comparisons, from a base to a table: sh examples/rlhf/run.sh
set -e
rung train examples/rlhf/sft.yaml
rung generate runs/rlhf/sft --data examples/rlhf/prompts.jsonl --limit 60 --n 4 --distinct --max-new-tokens 40 -o runs/rlhf/candidates.jsonl
python examples/rlhf/house.py rank runs/rlhf/candidates.jsonl runs/rlhf/ranked.jsonl
rung train examples/rlhf/reward.yaml
rung train examples/rlhf/ppo.yaml
rung train examples/rlhf/dpo.yaml
for run in sft ppo dpo; do
    rung generate runs/rlhf/$run --data examples/rlhf/heldout.jsonl --limit 100 --n 1 --max-new-tokens 40 \
        --reward runs/rlhf/reward --reference runs/rlhf/sft -o runs/rlhf/answers/$run.jsonl
done
python examples/rlhf/house.py judge runs/rlhf/answers/sft.jsonl runs/rlhf/answers/ppo.jsonl runs/rlhf/answers/dpo.jsonl
