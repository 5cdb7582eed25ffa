# SPDX-License-Identifier: Apache-2.0
"""``python -m fusae``: what can run here. ``python -m fusae COMMAND``: the command line."""

import sys

if len(sys.argv) > 1:
    from .cli import main

    main()
else:
    from .info import report

    print(report())
