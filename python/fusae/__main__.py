# SPDX-License-Identifier: Apache-2.0
from .info import report

print(report())
