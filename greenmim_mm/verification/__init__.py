"""Verify: converted weights run in the target library's own models, beside GreenSwin.

The libraries are imported when they are needed.
"""

from .comparison import Verification, VerificationError, verify, verify_network

__all__ = ['Verification', 'VerificationError', 'verify', 'verify_network']
