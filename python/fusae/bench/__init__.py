# SPDX-License-Identifier: Apache-2.0
"""`fusae bench`: an op beside plain torch, or beside a function of one's own, with the conformance gate first."""

from .own import OwnError, load

__all__ = ["OwnError", "load"]
