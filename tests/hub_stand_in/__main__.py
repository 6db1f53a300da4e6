"""Run the stand-in by hand: `python -m tests.hub_stand_in --port 8080 [--root FOLDER]`."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from tests.hub_stand_in import HubStandIn


def main() -> None:
    """Serve until Ctrl-C, and say how to point a client here."""
    parser = argparse.ArgumentParser(description="A stand-in for the Hugging Face Hub.")
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    parser.add_argument("--root", type=Path, help="where large files go; a new folder by default")
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as scratch,
        HubStandIn(given.root or Path(scratch) / "hub", port=given.port) as hub,
    ):
        for name, value in hub.environment(Path(scratch) / "home").items():
            print(f"export {name}={value}")
        print(f"# a token that may only read: HF_TOKEN={hub.read_token}")
        print("# user alice, member of acme; Ctrl-C ends it", flush=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
