# SPDX-License-Identifier: Apache-2.0
"""Serve a bundle over HTTP: resident ranks behind a server that speaks OpenAI's images API.

The process of the server imports no PyTorch. It starts one more process, the supervisor, which launches the ranks.
Server and ranks talk over a Unix socket in a private folder, in frames of JSON
(:mod:`districompile.runtime.processes.frames`).
"""
