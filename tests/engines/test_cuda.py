"""The driver's wrapper on the emulated driver: memory, graphs, kernels, and what it says when something is missing."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace

import numpy as np
import pytest

from engines.cuda import Cuda
from engines.errors import BackendError, KernelError
from plugins.artifacts import Artifacts
from plugins.op import Kernel, Launch
from tests.emulator.driver import Driver, emulated_artifacts
from tests.emulator.memory import MemoryFault

COPY = Kernel(
    "copy_one_too_many",
    "tests.emulator.kernels_for_tests:copy_one_too_many",
    (("source", "*fp32"), ("target", "*fp32"), ("count", "i32")),
    (("BLOCK", 16),),
)


def copy(source: int, target: int, count: int, kernel: Kernel = COPY) -> Launch:
    """A launch of one program."""
    return Launch(kernel, (1, 1, 1), {"source": source, "target": target, "count": count})


def upload(cuda: Cuda, array: np.ndarray):
    stream, buffer = cuda.stream(), cuda.buffer(array.nbytes, "a test")
    buffer.upload(array, stream)
    return stream, buffer


@pytest.mark.parametrize("sm", [86, 87, 120])
def test_a_kernel_gets_its_arguments(sm):
    """The cubin of the GPU's SM where there is one, else PTX; arguments in the order of the code's parameters."""
    driver = Driver(sm=sm)
    cuda = Cuda(driver)
    assert (cuda.sm, cuda.integrated, cuda.name) == (sm, False, "Emulated GPU")
    values = np.arange(32, dtype=np.float32)
    stream, source = upload(cuda, values)
    _, target = upload(cuda, np.zeros(32, np.float32))
    artifacts = emulated_artifacts([replace(COPY, parameters=COPY.parameters[::-1])], sms=(86, 87))
    for count in (3, 9, 15):
        cuda.run(artifacts, [copy(source.address, target.address, count)], int(stream))
        found = target.download(np.empty(32, np.float32), stream)
        assert np.array_equal(found[:count], values[:count]) and not found[count:].any()
    # The same code again, from another engine, is not loaded again.
    other = Artifacts.from_bytes(artifacts.to_bytes())
    cuda.run(other, [copy(source.address, target.address, 4)], int(stream))
    stream.wait()
    assert driver.counts["cuModuleLoadData"] == 1 and driver.launches == [COPY.name] * 4


def test_kernels_that_cannot_run():
    cuda = Cuda(Driver())
    stream, artifacts = cuda.stream(), emulated_artifacts([COPY])
    missing = replace(COPY, name="another")
    with pytest.raises(KernelError, match="no compiled kernel another"):
        cuda.run(artifacts, [copy(0, 0, 0, missing)], int(stream))
    with pytest.raises(KernelError, match="BLOCK"):
        cuda.run(artifacts, [copy(0, 0, 0, replace(COPY, constants=(("BLOCK", 32),)))], int(stream))
    with pytest.raises(ValueError, match="2 arguments, 3 parameters: count"):
        cuda.run(artifacts, [Launch(COPY, (1, 1, 1), {"source": 0, "target": 0})], int(stream))

    def changed(**change) -> Artifacts:
        return Artifacts((replace(artifacts.compiled[0], **change),), {})

    launch = [copy(0, 0, 0)]
    with pytest.raises(BackendError, match=r"does not take the code for SM 86.*INVALID_IMAGE(.|\n)*update the NVIDIA"):
        cuda.run(changed(cubins={86: b"\x7fELF"}), launch, int(stream))
    with pytest.raises(BackendError, match=r"needs 200000 bytes of shared memory(.|\n)*101376(.|\n)*--no-plugins"):
        cuda.run(changed(shared=200_000), launch, int(stream))
    with pytest.raises(KernelError, match="on SM 75"):
        Cuda(Driver(sm=75)).run(changed(cubins={80: b""}), launch, int(stream))


def test_more_than_48_kb_of_shared_memory_is_asked_for():
    driver = Driver()
    cuda = Cuda(driver)
    stream, source = upload(cuda, np.zeros(32, np.float32))
    compiled = replace(emulated_artifacts([COPY]).compiled[0], shared=64 << 10)
    cuda.run(Artifacts((compiled,), {}), [copy(source.address, source.address + 64, 3)], int(stream))
    stream.wait()
    assert driver.counts["cuFuncSetAttribute"] == 1 and driver.launches == [COPY.name]


@pytest.mark.parametrize("integrated", [False, True])
def test_memory_both_sides_see(integrated):
    driver = Driver(integrated=integrated)
    cuda = Cuda(driver)
    stream, shared, other = cuda.stream(), cuda.shared(64, "a test"), cuda.buffer(64, "a test")
    shared.view(0, (8,), np.int64)[:] = np.arange(8)
    shared.upload(stream)
    other.take(shared.address, 64, stream)
    assert other.download(np.empty(8, np.int64), stream).tolist() == list(range(8))
    other.fill(0, stream)
    cuda.call("cuMemcpyDtoDAsync", shared.address, other.address, 64, stream.handle)
    shared.download(stream)
    stream.wait()
    assert not shared.host.any()
    assert bool(driver.counts["cuMemcpyHtoDAsync"]) is not integrated  # one memory needs no copies
    with pytest.raises(ValueError, match="65 of 64"):
        shared.upload(stream, 65) if not integrated else shared._bytes(65)
    del shared, other
    gc.collect()
    assert len(driver.memory) == len(driver.pinned) == 0


def test_graphs_replay_and_record_nothing_forbidden():
    driver = Driver()
    cuda = Cuda(driver)
    stream, source = upload(cuda, np.arange(16, dtype=np.float32))
    _, target = upload(cuda, np.zeros(16, np.float32))
    artifacts, launch = emulated_artifacts([COPY]), copy(source.address, target.address, 15)
    cuda.run(artifacts, [launch], int(stream))
    stream.wait()
    target.fill(0, stream)
    graph = cuda.capture(stream, lambda: cuda.run(artifacts, [launch], int(stream)))
    host = np.empty(16, np.float32)
    assert not target.download(host, stream).any()  # recorded, not run
    for value in (2.0, 3.0):
        source.upload(np.full(16, value, np.float32), stream)
        graph.launch(stream)
        assert target.download(host, stream)[:15].tolist() == [value] * 15

    event, another = cuda.event(), emulated_artifacts([replace(COPY, warps=8)])
    forbidden = {
        "cuMemAlloc": lambda: cuda.buffer(16, "a test"),
        "cuStreamSynchronize": stream.wait,
        "cuEventSynchronize": event.wait,
        "the code": lambda: cuda.run(another, [replace(launch, kernel=another.compiled[0].kernel)], int(stream)),
    }
    for value, (name, action) in enumerate(forbidden.items(), start=4):
        with pytest.raises(BackendError, match=rf"{name}(.|\n)*(STREAM_CAPTURE|not permitted)"):
            cuda.capture(stream, action)
        source.upload(np.full(16, value, np.float32), stream)  # stream and graph are as usable as before
        graph.launch(stream)
        assert target.download(host, stream)[:15].tolist() == [value] * 15
    assert driver.counts["cuGraphInstantiate"] == 1
    with pytest.raises(MemoryFault, match="a recorded copy"):  # pageable memory
        cuda.capture(stream, lambda: source.upload(np.zeros(4, np.float32), stream))


def test_events_take_the_time_of_the_device(monkeypatch):
    """When the stream passes them, not when they are recorded; in milliseconds, of the work between them."""
    clock = [5.0]
    monkeypatch.setattr("tests.emulator.driver.perf_counter", lambda: clock[0])

    def work() -> None:
        clock[0] += 0.25

    driver = Driver()
    cuda = Cuda(driver)
    stream, events = cuda.stream(), [cuda.event() for _ in range(3)]
    events[0].record(stream)
    driver.submit(int(stream), work)
    events[1].record(stream)
    driver.submit(int(stream), work)
    driver.submit(int(stream), work)
    events[2].record(stream)
    assert clock == [5.0]  # nothing has run
    events[1].wait()
    assert clock == [5.25] and events[1].since(events[0]) == 250
    events[2].wait()
    assert clock == [5.75] and events[2].since(events[1]) == 500 and events[2].since(events[0]) == 750


def test_no_room():
    cuda = Cuda(Driver(total=1 << 20))
    assert cuda.memory() == (1 << 20, 1 << 20)
    with pytest.raises(BackendError) as caught:
        cuda.buffer(3 << 30, "the cache", fix="take less")
    assert caught.value.found == "the cache needs 3.22 GB of Emulated GPU's memory"
    assert "0.00 GB that are free" in caught.value.expected and caught.value.fix == "take less"


def test_no_gpu_and_an_old_driver():
    with pytest.raises(BackendError, match=r"CUDA_ERROR_NO_DEVICE(.|\n)*CUDA_VISIBLE_DEVICES"):
        Cuda(Driver(devices=0))
    with pytest.raises(BackendError, match=r"supports CUDA 11\.4(.|\n)*12\.0 or newer(.|\n)*update"):
        Cuda(Driver(version=11040))
    with pytest.raises(BackendError, match="no GPU 1"):
        Cuda(Driver(), ordinal=1)


@pytest.mark.parametrize("driver", [12000, 12060, 12070])
def test_bindings_of_cuda_13_are_refused_before_a_driver_of_12_8(monkeypatch, driver):
    """They would start, and fail after the first run, when they are asked for its time."""
    monkeypatch.setattr(Driver, "CUDA_VERSION", 13050)
    with pytest.raises(BackendError, match=r"cuda-bindings 13\.5 with a driver of CUDA 12\.(0|6|7)") as caught:
        Cuda(Driver(version=driver))
    assert "'cuda-bindings>=12.8,<13'" in caught.value.fix
    for version in (12080, 12090, 13000):
        Cuda(Driver(version=version))
    monkeypatch.setattr(Driver, "CUDA_VERSION", 12090)
    Cuda(Driver(version=driver))


def test_what_the_bindings_do_not_find_in_a_driver_is_told(monkeypatch):
    """They look a function up when it is first called, and raise an error of their own."""
    cuda = Cuda(Driver())
    start, end = cuda.event(), cuda.event()

    def missing(*_):
        raise RuntimeError("function cuEventElapsedTime is not found")

    monkeypatch.setattr(Driver, "cuEventElapsedTime", missing)
    with pytest.raises(BackendError, match="no cuEventElapsedTime of this driver") as caught:
        end.since(start)
    assert "'cuda-bindings>=12.8,<13'" in caught.value.fix
    monkeypatch.setattr(Driver, "cuMemAlloc", missing)
    with pytest.raises(BackendError, match="no cuMemAlloc of this driver"):
        cuda.buffer(16, "a test")


def test_the_bindings_that_are_installed_say_their_version():
    driver = pytest.importorskip("cuda.bindings.driver", reason="pip install cuda-bindings")
    assert int(driver.CUDA_VERSION) >= 12080


def test_what_another_thread_drops_is_freed():
    """A driver takes memory back in a thread that has the GPU's context alone."""
    driver = Driver()
    cuda = Cuda(driver)
    held = [cuda.buffer(100, "a test"), cuda.shared(100, "a test")]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert len(driver.memory) == len(driver.pinned) == 0


def test_a_thread_without_the_context_is_told_so():
    cuda, said = Cuda(Driver()), list[str]()

    def ask() -> None:
        try:
            cuda.buffer(100, "a test")
        except BackendError as error:
            said.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert len(said) == 1 and "CUDA_ERROR_INVALID_CONTEXT" in said[0]
