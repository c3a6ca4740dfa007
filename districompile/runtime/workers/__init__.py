# SPDX-License-Identifier: Apache-2.0
"""Ranks in processes of their own, for a caller that is no rank.

:mod:`.group` starts and watches them, :mod:`.runner` sends them the calls of a module, and :mod:`.rank` is what each of
them does. Tensors go through shared memory (:mod:`.memory`), and everything else in frames of JSON.
"""
