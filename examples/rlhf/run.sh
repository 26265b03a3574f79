#!/bin/sh
# The three steps of RLHF, and DPO on the same comparisons, from a base to a table: sh examples/rlhf/run.sh
set -e
rung train examples/rlhf/sft.yaml
rung generate runs/rlhf/sft --data examples/rlhf/prompts.jsonl --limit 60 --n 4 --distinct --max-new-tokens 40 -o runs/rlhf/candidates.jsonl
if [ -n "$PEOPLE" ]; then
    # people rank on a page until they press Ctrl-C here: PEOPLE=2 sh examples/rlhf/run.sh
    trap : INT # Ctrl-C ends the page and not this script
    rung label rank runs/rlhf/candidates.jsonl -o runs/rlhf/labels --people "$PEOPLE" --guide "As our shop would write it: right, by name, and short."
    trap - INT
    rung label result runs/rlhf/labels --export rated -o runs/rlhf/ranked.jsonl
else
    python examples/rlhf/house.py rank runs/rlhf/candidates.jsonl runs/rlhf/ranked.jsonl
fi
rung train examples/rlhf/reward.yaml
rung train examples/rlhf/ppo.yaml
rung train examples/rlhf/dpo.yaml
for run in sft ppo dpo; do
    rung generate runs/rlhf/$run --data examples/rlhf/heldout.jsonl --limit 100 --n 1 --max-new-tokens 40 \
        --reward runs/rlhf/reward --reference runs/rlhf/sft -o runs/rlhf/answers/$run.jsonl
done
python examples/rlhf/house.py judge runs/rlhf/answers/sft.jsonl runs/rlhf/answers/ppo.jsonl runs/rlhf/answers/dpo.jsonl
