"""Asks for each token's log-probability as lm_eval's model local-completions does, and notes what it was told."""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from pathlib import Path

from transformers import AutoTokenizer


def main() -> None:
    verb, *arguments = sys.argv[1:]
    assert verb == "run"
    given = dict(zip(arguments[::2], arguments[1::2], strict=False))
    options = dict(pair.split("=", 1) for pair in given["--model_args"].split(","))
    task = given["--tasks"]
    if task == "broken":
        sys.exit("Traceback: none\nValueError: Tasks not found: broken")
    if task == "silent":
        sys.exit(0)
    if task == "endless":
        note = Path(os.environ["NOTED"])
        note.with_suffix(".part").write_text(str(os.getpid()))
        note.with_suffix(".part").rename(note)  # a reader never finds half of it
        time.sleep(60)
    tokenizer = AutoTokenizer.from_pretrained(options["tokenizer"])
    ids = tokenizer("what is in box 3?", add_special_tokens=False)["input_ids"]
    body = {"model": options["model"], "prompt": ids, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
    key = os.environ["OPENAI_API_KEY"]
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    request = urllib.request.Request(options["base_url"], json.dumps(body).encode(), headers)  # noqa: S310 -- the server of the test
    with urllib.request.urlopen(request) as response:  # noqa: S310 -- the same
        logprobs = json.load(response)["choices"][0]["logprobs"]
    # the first token has none, and the last one was drawn
    nats, best = logprobs["token_logprobs"][1:-1], logprobs["top_logprobs"][1:-1]
    greedy = sum(own == max(top.values()) for own, top in zip(nats, best, strict=True))
    scores = {"nats,none": -sum(nats), "nats_stderr,none": 0.5, "greedy,strict": greedy, "greedy_stderr,strict": "N/A"}
    found = {
        "results": {task: {"alias": task, **scores}},
        "n-samples": {task: {"effective": 7}},
        "n-shot": {task: 2},
        "versions": {task: 1.0},
        "higher_is_better": {task: {"nats": False}},
        "lm_eval_version": "9.9",
    }
    folder = Path(given["--output_path"]) / "model"
    folder.mkdir(parents=True)
    (folder / "results_2026.json").write_text(json.dumps(found))
    Path(os.environ["NOTED"]).write_text(json.dumps({"arguments": arguments, "options": options, "key": key}))


if __name__ == "__main__":
    main()
