# SPDX-License-Identifier: Apache-2.0
"""Backbones that several systems of the zoo share. Each function gives the layers up to the last feature map, without pool and classifier."""
