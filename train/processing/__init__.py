# SPDX-License-Identifier: Apache-2.0
"""What stands before and behind a network on a device, in plain numpy: nothing here imports torch."""
