"""Settings that must stand before any test imports torch."""

import os

# As the command line does: waiting threads must not starve the other tests on 2 cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Nothing in the tests may look for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
