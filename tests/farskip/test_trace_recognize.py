"""Recognition by names, arguments, operators and patterns; what public traces taught stands here as small cases."""

from pathlib import Path

import pytest

from farskip.testing_traces import ALL_TO_ALL, COMMUNICATION_STREAM, GEMM, TraceBuilder
from farskip.trace import inspect
from farskip.trace_model import Category
from farskip.trace_recognize import operation_kind, parse_user_pattern, verdict_by_name
from farskip.trace_report import RankReport

BY_NAME = [
    ("ncclKernel_AllReduce_RING_LL_Sum_float(ncclWorkElem)", "all_reduce"),
    ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "all_gather"),
    ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(x)", "reduce_scatter"),
    ("ncclKernel_Broadcast_RING_LL_Sum_int8_t(x)", "broadcast"),
    ("ncclSymDevKernel_AllGather_LL(x)", "all_gather"),
    ("ncclDevKernel_Generic(ncclDevKernelArgsStorage<4096ul>)", "unknown"),
    ("ncclKernel_SendRecv_RING_SIMPLE_Sum_int8_t(x)", "send_recv"),
    ("mscclKernel_Sum_half(x)", "unknown"),
    ("void deep_ep::internode::dispatch<false, 8, true, 8>(int4*, float*)", "dispatch"),
    ("void dpsk::ep::internode::combine<false, 8, __nv_bfloat16, 8, 2>(int4*)", "combine"),
    ("void dpsk::ep::internode::cached_notify<false>(int, int)", "notify"),
    ("void deep_ep::intranode::notify_dispatch<8>(int const*)", "notify"),
    ("void deep_ep::internode_ll::combine<true, 3>(void*)", "combine"),
    ("void deep_ep::internode_ll::clean_low_latency_buffer<32>(int*)", "notify"),
    ("void deep_ep::intranode::barrier<8>(int**)", "notify"),
    ("_ZN7deep_ep9internode8dispatchILb0EEvPv", "dispatch"),
    ("mori::moe::EpDispatchIntraNodeKernel<hip_bfloat16>(x)", "dispatch"),
    ("void vllm::cross_device_reduce_1stage<float, 8>(x)", "all_reduce"),
    ("void (anonymous namespace)::multimem_all_reduce_kernel<c10::BFloat16, 16>(c10::BFloat16*)", "all_reduce"),
    ("void two_shot_all_reduce_kernel_inplace<float>(x)", "all_reduce"),
    ("void flashinfer::trtllm_allreduce_fusion::allreduce_fusion_kernel_oneshot_lamport<8>(x)", "all_reduce"),
    ("void nvshmemi_alltoall_on_stream_kernel<char>(x)", "all_to_all"),
    ("nvshmemi_transfer_put_signal(x)", "unknown"),
]

COMPUTE = [
    GEMM,
    "void dpsk::ep::cuda::get_dispatch_layout<256, 32, 8>(long const*, int*)",
    "void deep_ep::layout::get_dispatch_layout<256>(long const*)",
    "void cub::DeviceReduceByKeyKernel<cub::DispatchReduceByKey<long*, long*> >(long*)",
    "void (anonymous namespace)::groupnorm_kernel_dispatch_up<__hip_bfloat16, 1024u>(x)",
    "_combined_routing_memset",
    "reduce_segments",
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float> >(x)",
    "void cudnn::cnn::reduce_wgrad_nchw_helper<float, float>(x)",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float> >(int)",
    "void moe::dev::finalize::finalizeKernelVecLoad<x>(x)",
    "triton_red_fused_all_gather_sum_1",
    "void cutlass::device_kernel<dpsk::grouped_gemm::cuda::fp8_ptp128c::GemmKernel>(x)",
]


@pytest.mark.parametrize(("name", "kind"), BY_NAME, ids=[name[:40] for name, _ in BY_NAME])
def test_communication_by_name(name: str, kind: str) -> None:
    verdict = verdict_by_name(name, Category.KERNEL)
    assert verdict is not None and verdict.kind == kind


@pytest.mark.parametrize("name", COMPUTE, ids=[name[:40] for name in COMPUTE])
def test_compute_by_name(name: str) -> None:
    assert verdict_by_name(name, Category.KERNEL) is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("allreduce_", "all_reduce"),
        ("_allgather_base_", "all_gather"),
        ("allgather_into_tensor_coalesced_", "all_gather"),
        ("_reduce_scatter_base_", "reduce_scatter"),
        ("alltoall_base_", "all_to_all"),
        ("all_to_allv", "all_to_all"),
        ("broadcast_", "broadcast"),
        ("send", "send_recv"),
        ("recv_", "send_recv"),
        ("recv_any_source_", "send_recv"),
        ("barrier", "notify"),
        ("gather_", "unknown"),
        ("descend", "unknown"),
    ],
)
def test_operations(name: str, kind: str) -> None:
    assert operation_kind(name) == kind


def measure(trace: TraceBuilder, tmp_path: Path, *patterns: str) -> RankReport:
    return inspect(trace.write(tmp_path / "rank0.json"), communication=patterns).ranks[0]


def counted(report: RankReport) -> dict[str, int]:
    return {kind: figures.count for kind, figures in report.collectives.items()}


def test_arguments_say_what_a_send_recv_kernel_does(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.kernel(ALL_TO_ALL, 0, 50, stream=20, **{"Collective name": "all_to_allv"})
    trace.kernel(ALL_TO_ALL, 60, 90, stream=20, **{"Collective name": "send"})
    assert counted(measure(trace, tmp_path)) == {"all_to_all": 1, "send_recv": 1}


def test_the_operator_says_what_an_amd_generic_kernel_does(tmp_path: Path) -> None:
    """On MI300 every RCCL kernel is called Generic and carries no arguments."""
    trace = TraceBuilder()
    trace.operator("record_param_comms", 0, 40)
    trace.range("nccl:all_reduce", 5, 35)
    trace.kernel("ncclDevKernel_Generic(x)", 50, 90, stream=4, launch=20, kind="Dispatch Kernel")
    trace.kernel("ncclDevKernel_Generic(x)", 100, 120, stream=4, launch=60)
    assert counted(measure(trace, tmp_path)) == {"all_reduce": 1, "unknown": 1}


def test_a_send_recv_that_nothing_explains_is_unknown(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.kernel(ALL_TO_ALL, 0, 50, stream=20)
    assert counted(measure(trace, tmp_path)) == {"unknown": 1}


def test_a_send_recv_inside_our_dispatch_is_an_all_to_all(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.range("farskip::L002::dispatch::launch", 0, 20)
    trace.kernel(ALL_TO_ALL, 30, 50, stream=20, launch=10)
    trace.range("farskip::L002::pipeline::launch", 60, 80)
    trace.kernel(ALL_TO_ALL, 90, 99, stream=20, launch=70)
    assert counted(measure(trace, tmp_path)) == {"all_to_all": 1, "unknown": 1}


def test_local_helpers_stay_compute_whatever_launched_them(tmp_path: Path) -> None:
    """Kineto puts the collective's arguments on every kernel below record_param_comms."""
    trace = TraceBuilder()
    trace.range("nccl:all_reduce", 0, 40)
    cast = "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>(x)"
    trace.kernel(cast, 50, 60, stream=20, launch=10, **{"Collective name": "allreduce"})
    trace.kernel("void deep_ep::layout::get_dispatch_layout<256>(x)", 70, 80, stream=20, launch=20)
    report = measure(trace, tmp_path)
    assert counted(report) == {} and report.compute_ns == 20


def test_an_unknown_kernel_below_nccl_is_communication(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.range("nccl:all_gather", 0, 40)
    trace.kernel("some_vendors_ring_kernel", 50, 60, stream=20, launch=10)
    trace.kernel("some_vendors_ring_kernel", 70, 80, stream=20, launch=60)
    assert counted(measure(trace, tmp_path)) == {"all_gather": 1}


def test_user_patterns_come_last_and_may_say_the_kind(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.kernel("my_ring_kernel", 0, 50, stream=20)
    trace.kernel("my_tree_kernel", 60, 90, stream=20)
    trace.kernel("ncclDevKernel_AllReduce_x(y)", 95, 99, stream=20)
    assert counted(measure(trace, tmp_path)) == {"all_reduce": 1}
    report = measure(trace, tmp_path, "all_gather=my_ring", "my_|nccl")
    assert counted(report) == {"all_gather": 1, "unknown": 1, "all_reduce": 1}
    said = {name.name: name.said_by for name in report.recognized}
    assert said["my_ring_kernel"] == "pattern" and said["ncclDevKernel_AllReduce_x(y)"] == "name"


def test_a_pattern_that_does_not_compile_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"--communication 'a\('.*escape special characters"):
        parse_user_pattern("a(")


def test_a_deepep_trace_is_not_without_communication(tmp_path: Path) -> None:
    """The complaint this tool answers: matching by nccl sees nothing in such a trace."""
    trace = TraceBuilder()
    trace.kernel(GEMM, 0, 100)
    trace.kernel("void deep_ep::internode::notify_dispatch<false, 8>(x)", 10, 30, stream=COMMUNICATION_STREAM)
    trace.kernel("void deep_ep::internode::dispatch<false, 8>(x)", 30, 90, stream=COMMUNICATION_STREAM)
    trace.kernel("void deep_ep::internode::combine<false, 8>(x)", 95, 135, stream=COMMUNICATION_STREAM)
    report = measure(trace, tmp_path)
    assert counted(report) == {"notify": 1, "dispatch": 1, "combine": 1}
    assert report.overlap_percent == pytest.approx(100 * 85 / 120)
    assert inspect(tmp_path / "rank0.json", mode="hta").ranks[0].overlap_percent is None


def test_names_list_every_row_once(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.kernel(GEMM, 0, 100)
    trace.kernel(GEMM, 100, 150)
    trace.copy(150, 160)
    trace.kernel(ALL_TO_ALL, 160, 170, stream=20)
    found = {(name.counted_as, name.count, name.summed_ns) for name in measure(trace, tmp_path).recognized}
    assert found == {("compute", 2, 150), ("copy", 1, 10), ("communication: unknown", 1, 10)}
