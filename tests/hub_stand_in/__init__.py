"""A stand-in for the Hugging Face Hub, for tests: the real client talks to it over loopback.

It is strict where a mistake would lose something: sha256 and size of every LFS object, the parent
of a commit, the role of a token, private and gated repositories, metadata of cards, and no
Authorization header at the storage (a second server, as large files lie on another host).

    with HubStandIn(tmp_path / "hub") as hub:
        hub.fail("commit", 503)                  # the next commit is answered so
        hub.cut("commit", "after")               # the one behind it happens, its answer is lost
        subprocess.run(command, env=os.environ | hub.environment(tmp_path / "home"))
        assert len(hub.commits("alice/merged")) == 2  # the Hub's own first one, and ours

By hand: `python -m tests.hub_stand_in --port 8080`.

What it does not cover: Xet (set HF_HUB_DISABLE_XET=1, as `environment` does) and HTTPS, so that the
client's reading of a 401 on a repository's address (only tried for https) is not exercised; git
over HTTP; deleting and moving of repositories (501); LFS locks, batches for downloads; merging of
pull requests; .gitignore; security scans, statistics, discussions' comments; organisations' roles
other than member; quotas and rate limits other than injected ones; OAuth; running a Space.
PyYAML reads the metadata of cards, the rest is the standard library. Commits live in memory,
large files in the given folder.
"""

from tests.hub_stand_in.faults import Fault
from tests.hub_stand_in.server import HubStandIn, Request

__all__ = ["Fault", "HubStandIn", "Request"]
