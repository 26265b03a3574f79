"""Banking77's intents as passages to look up: `python prepare.py categories.json OUT.jsonl`."""

import json
import sys
from pathlib import Path


def main() -> int:
    """One passage an intent: its name in words and as it is answered."""
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        intents = json.loads(Path(sys.argv[1]).read_text())
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    rows = [{"text": f"{intent.replace('_', ' ')}: {intent}"} for intent in intents]
    Path(sys.argv[2]).parent.mkdir(parents=True, exist_ok=True)
    Path(sys.argv[2]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
