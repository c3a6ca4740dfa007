# SPDX-License-Identifier: Apache-2.0
"""Test the predicted times of kernels and steps."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from districompile.cost.gpus import GPUS, UnknownGpuError, find_gpu, gpu_of_device
from districompile.cost.predict import EFFICIENCY, compute_ms, estimate_step, kernel_seconds
from districompile.cost.work import KernelWork

H100 = find_gpu("h100")


def product(m: int, n: int, k: int, itemsize: int = 2) -> KernelWork:
    return KernelWork("matmul", 2.0 * m * n * k, itemsize * (m * k + k * n + m * n), itemsize, m, n, k)


def test_a_large_product_takes_the_peak_share() -> None:
    work = product(8448, 8192, 8192)  # whole waves of 132 multiprocessors
    ideal = work.flops / (H100.tensor_tflops * 1e12 * EFFICIENCY.matmul)
    assert kernel_seconds(work, H100) == pytest.approx(ideal, rel=0.1)


def test_a_kernel_without_products_takes_its_bytes() -> None:
    work = KernelWork("memory", 0.0, 1e9, 2)
    ideal = 1e9 / (H100.bandwidth * 1e9 * EFFICIENCY.memory)
    assert kernel_seconds(work, H100) == pytest.approx(ideal, rel=0.02)


def test_few_rows_use_a_part_of_the_gpu() -> None:
    """Half of the rows take more than half of the time, once there are fewer tiles than multiprocessors."""
    tall, short = product(1024, 1280, 1280), product(256, 1280, 1280)
    assert kernel_seconds(short, H100) > kernel_seconds(tall, H100) / 4


@given(m=st.integers(1, 5000), n=st.integers(1, 5000), k=st.integers(1, 5000))
def test_more_work_never_takes_less_time(m: int, n: int, k: int) -> None:
    assert kernel_seconds(product(m, n, k), H100) <= kernel_seconds(product(2 * m, n, k), H100) + 1e-12
    assert kernel_seconds(product(m, n, k), H100) <= kernel_seconds(product(m, n, 2 * k), H100) + 1e-12
    assert 0 < kernel_seconds(product(m, n, k), H100) <= kernel_seconds(product(m, n, k, 4), H100)


def test_only_the_exact_phase_waits() -> None:
    sent = [10**8, 2 * 10**8]
    exact = estimate_step([5.0, 6.0], sent, 100, "exact", H100)
    displaced = estimate_step([5.0, 6.0], sent, 9, "displaced", H100)
    assert exact.compute_ms == displaced.compute_ms == 6.0  # the slowest rank
    assert exact.exposed_ms == pytest.approx(exact.transfer_ms + 100 * EFFICIENCY.wait_us / 1e3)
    assert displaced.exposed_ms == pytest.approx(EFFICIENCY.overlap * displaced.transfer_ms)
    assert estimate_step([5.0], [0], 0, "exact", H100).ms == 5.0


def test_a_slow_link_is_not_hidden() -> None:
    slow = dataclasses.replace(H100, link=1.0)
    step = estimate_step([5.0, 5.0], [10**8] * 2, 9, "displaced", slow)
    assert step.ms >= step.transfer_ms >= 100.0


def test_gpus_are_found_by_name() -> None:
    assert find_gpu("H100") is GPUS["h100"]
    with pytest.raises(UnknownGpuError, match=r"'h10'.*did you mean h100"):
        find_gpu("h10")
    gib = 2**30
    assert gpu_of_device("NVIDIA H100 80GB HBM3", 80 * gib) is GPUS["h100"]
    assert gpu_of_device("NVIDIA H100 PCIe", 80 * gib) is GPUS["h100-pcie"]
    assert gpu_of_device("NVIDIA H200", 140 * gib) is GPUS["h200"]
    assert gpu_of_device("NVIDIA A100-SXM4-40GB", 40 * gib) is GPUS["a100-40gb"]
    assert gpu_of_device("NVIDIA GeForce RTX 4090", 24 * gib) is GPUS["rtx-4090"]
    assert gpu_of_device("NVIDIA GeForce GTX 1080", 8 * gib) is None


def test_times_add_up() -> None:
    work = [product(512, 512, 512), KernelWork("memory", 0.0, 1e6, 2)]
    assert compute_ms(work, H100) == pytest.approx(1e3 * sum(kernel_seconds(w, H100) for w in work))
