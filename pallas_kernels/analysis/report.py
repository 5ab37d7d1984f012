"""One case on one chip: counted bytes beside the least possible, slots filled, memory asked, and times from them."""

from __future__ import annotations

import dataclasses
from typing import Any

from pallas_kernels.analysis.cases import Case, Source
from pallas_kernels.analysis.interpreter import UnknownValueError
from pallas_kernels.analysis.schedule import Worker
from pallas_kernels.analysis.traffic import count_traffic
from pallas_kernels.chip import named_chip


@dataclasses.dataclass(frozen=True)
class Report:
    """Bytes in bytes, times in microseconds; None for what isn't known.

    Attributes:
      counted_bytes: that the kernels move.
      xla_bytes, xla_flops: of XLA's own operations around them, the bytes a rough figure.
      kernel_flops: of the kernels' products as they run, padding and recomputation included.
      schedules: of each kernel or fusion that has products, as `schedule.Schedule`'s fields.
      memory: argument, output and temporary bytes on the device, and the seconds that compiling took.
      error: why it doesn't compile.
    """

    case: str
    chip: str
    least_bytes: float | None = None
    flops: float | None = None
    counted_bytes: float | None = None
    xla_bytes: float | None = None
    kernel_flops: float | None = None
    xla_flops: float | None = None
    schedules: tuple[dict[str, Any], ...] = ()
    memory: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    error: str | None = None

    @property
    def bytes_over_least(self) -> float | None:
        """Of the kernels alone; XLA's operations come on top."""
        return self.counted_bytes / self.least_bytes if self.counted_bytes and self.least_bytes else None

    @property
    def matrix_slots(self) -> float | None:
        """Of the kernel with the most instructions."""
        largest = max(self.schedules, key=lambda s: s["bundles"], default=None)
        return largest["matrix_slots"] if largest else None

    @property
    def memory_us(self) -> float | None:
        """Moving the kernels' bytes, at the speed of the chip's memory."""
        if self.counted_bytes is None:
            return None
        return self.counted_bytes / named_chip(self.chip).memory_bytes_per_s * 1e6

    @property
    def matrix_us(self) -> float | None:
        """The products, at the chip's peak times the share of slots filled: waiting for memory isn't in it."""
        flops = (self.kernel_flops or 0) + (self.xla_flops or 0) or self.flops
        if not flops or not self.matrix_slots:
            return None
        return flops / (named_chip(self.chip).bf16_flops_per_s * self.matrix_slots) * 1e6

    def as_json(self) -> dict[str, Any]:
        derived = ("bytes_over_least", "matrix_slots", "memory_us", "matrix_us")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


def examine(
    case: Case, source: Source, chip: str, worker: Worker | None, answer: dict[str, Any] | None = None
) -> Report:
    """Counts, and compiles where there is a worker for it. Whatever goes wrong is said in the report.

    `answer`: of the worker, where the same program has been compiled before.
    """
    report = Report(case.name, chip, case.least_bytes, case.flops)
    try:
        if case.platform == "tpu":
            traffic = count_traffic(case.function, *case.arguments, chip=chip)
            report = dataclasses.replace(
                report,
                counted_bytes=traffic.total_bytes,
                xla_bytes=traffic.xla_bytes,
                kernel_flops=traffic.flops,
                xla_flops=traffic.xla_flops,
                notes=traffic.notes,
            )
    except UnknownValueError as e:
        report = dataclasses.replace(report, notes=(f"bytes not counted: {e}",))
    except Exception as e:  # an op that cannot be traced: the compiler's answer is the same error
        return dataclasses.replace(report, error=f"{type(e).__name__}: {str(e)[:500]}")
    if worker is not None and answer is None:
        answer = worker.analyse(source, case.name, chip)
    if answer is None:
        return report
    if "error" in answer:
        return dataclasses.replace(report, error=answer["error"])
    memory = {name: value for name, value in answer.items() if name != "schedules"}
    return dataclasses.replace(report, schedules=tuple(answer["schedules"]), memory=memory)
