"""torch's launcher of processes, with a store that listens to no other host where there is none.

It takes what `python -m torch.distributed.run` takes. PyTorch's store, where processes
exchange addresses, listens on all networks of a host whatever address it is given, and does what
anyone asks who reaches it.
"""

from __future__ import annotations

from torch.distributed import run
from torch.distributed.elastic.rendezvous import static_tcp_rendezvous

from utils.distributed.processes import open_store


def main() -> None:
    static_tcp_rendezvous.TCPStore = open_store  # type: ignore[assignment, misc]
    run.main()


if __name__ == "__main__":
    main()
