# SPDX-License-Identifier: Apache-2.0
"""Start-up check: the kernel this machine will use, against the oracle, before serving."""
