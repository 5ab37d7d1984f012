import sys

from glm45_jax.cli import main

sys.exit(main())
