"""Every safeguard of the core is removed in turn, and a named test has to turn red.

A mutation replaces a piece of a function's source by another and swaps the function's code in place, in this process or
in the ranks. If the piece is no longer there the mutation fails, so the list cannot rot silently. Each named test is
first run without the mutation: red proves something only for a test that is otherwise green.

    pytest tests/test_mutations.py -s                     prints what caught what
    pytest tests/test_mutations.py --update-snapshots     writes that table to docs/mutations.md
"""

import importlib
import importlib.util
import inspect
import itertools
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from farskip.testing import RankPool

TESTS = Path(__file__).parent
TABLE = TESTS.parent / "docs" / "mutations.md"


@dataclass(frozen=True)
class Catch:
    """A test that has to turn red: a function of a test file, with its arguments; on this many ranks, 0: in process."""

    path: str
    function: str
    arguments: tuple[Any, ...] = ()
    ranks: int = 0


@dataclass(frozen=True)
class Mutation:
    """What is broken, where (``module:function``), and by which change of source."""

    what: str
    where: str
    old: str
    new: str
    catch: Catch


# -- the tests that catch --

ASYNC = "farskip/test_async_autograd.py"
EXECUTOR = "farskip/test_executor.py"
RESIDUAL = "farskip/test_residual.py"
FUSION = "farskip/test_fusion.py"
ROWS_GRADIENT = "farskip/test_rows_gradient.py"
STREAM_KERNELS = "models/test_stream_kernels.py"
SCHEDULE = "farskip/test_schedule.py"
BALANCE = "farskip/test_balance.py"
HOST_COUNTS = "parallel/test_host_counts.py"
HOST_WAITS = "models/test_host_waits.py"
PENDING = "farskip/test_pending.py"
SIMULATOR = "farskip/test_simulator.py"
RACES = "parallel/test_races.py"
DISPATCHER = "parallel/test_dispatcher.py"
DATA_PARALLEL = "parallel/test_data_parallel.py"
GRADIENT_SUMS = "parallel/test_gradient_sums.py"
OPTIMIZER_SHARES = "parallel/test_optimizer_shares.py"
EMULATED = "parallel/test_emulated_link.py"
ORDINARY = "models/test_ordinary_equals_untouched.py"
WIRINGS = "models/test_wirings.py"
GRID = "models/test_expert_parallel.py"
CHAIN = "farskip/test_chain.py"
REDUCTION = "farskip/test_reduction_autograd.py"
REDUCED = "farskip/test_reduced_residual.py"
TENSOR_GRID = "models/test_tensor_parallel.py"
EARLIEST = "farskip/test_earliest_start.py"
SHARES = "farskip/test_token_shards.py"
SHARDED = "farskip/test_sharded_executor.py"
SEQUENCE_GRID = "models/test_sequence_parallel.py"
TENSOR_LINKS = "parallel/test_tensor_parallel.py"
LANES = "farskip/test_lanes.py"
SIDE_STREAM = "farskip/test_side_stream.py"
MEGATRON = "models/test_megatron.py"


ON_STREAMS = Catch(HOST_COUNTS, "test_the_host_waits_for_counts_and_not_for_what_compute_was_given_since")


def slowest_link(wiring: str = "farskip") -> Catch:
    return Catch(RACES, "test_the_slowest_link_changes_no_bit", ("deepseek_v3", wiring, 0))


def placements(wiring: int, chunks: int = 1) -> Catch:
    """By position in the list of wirings of that file."""
    return Catch(EXECUTOR, "test_every_placement_gives_the_bits_of_serial", (wiring, chunks))


ORDINARY_WIRING, FARSKIP_WIRING = 0, 1
ROWS_GRID = Catch(EXECUTOR, "test_rows_have_the_bits_of_merged_tokens", (FARSKIP_WIRING, False))
RECORDED = Catch(
    EXECUTOR, "test_recomputation_repeats_the_forward_list_and_keeps_the_backward_list", (1, "overlapped", 2)
)
UNDER_WAY = Catch(EXECUTOR, "test_exchanges_are_under_way_exactly_while_the_schedule_says_so", (1, "overlapped", 1))
REFERENCE = Catch(WIRINGS, "test_logits_and_every_gradient", ("deepseek_v3", "farskip", "all"))
LADDER_REFERENCE = Catch(WIRINGS, "test_logits_and_every_gradient", ("deepseek_v3", "ladder", "all"))
UNTOUCHED = Catch(ORDINARY, "test_logits_and_gradients", ("deepseek_v3", "sdpa"))
ONE_RANK = Catch(DISPATCHER, "test_one_rank", (7, 2, 2))
SUMS = Catch(DATA_PARALLEL, "sums", (2, 1 << 20), 4)
DIVIDED = Catch(OPTIMIZER_SHARES, "divided_equals_undivided", (2, 2), 4)
EARLY_SUMS = Catch(GRADIENT_SUMS, "early_equals_late", (2,), 2)
NORM = Catch(DATA_PARALLEL, "norm", (2, 0.25), 4)
POINT = Catch(GRID, "run_corner", ({"world": 2, "ep": 2},), 2)
NO_ROWS = Catch("models/test_hf_layer.py", "test_experts_without_a_row_keep_the_graph_whole", ("deepseek_v3",))


def reduced(wiring: str = "ladder", mix: str = "dense", expert_parallel: bool = False) -> Catch:
    return Catch(REDUCED, "test_serial_overlapped_and_the_plain_executor_agree", (wiring, mix, expert_parallel))


def tensor_point(**changes: Any) -> Catch:
    return Catch(TENSOR_GRID, "run_corner", (changes,), 2)


def sharded(wiring: str = "ladder", mix: str = "mixed", expert_parallel: bool = True, chunks: int = 3) -> Catch:
    name = "test_serial_overlapped_and_the_plain_executor_agree"
    return Catch(SHARDED, name, (wiring, mix, expert_parallel, chunks))


def sequence_point(**changes: Any) -> Catch:
    return Catch(SEQUENCE_GRID, "run_corner", (changes,), 2)


SHARES_ON_LATE_LINKS = Catch(
    TENSOR_LINKS, "test_a_model_over_a_late_link_keeps_its_bits", ({"sequence_parallel": True},)
)


def aside(side_stream: str = "merge_and_route") -> Catch:
    """Of every placement, by a book of what two streams could race for."""
    name = "test_every_placement_gives_the_bits_of_serial_without_a_race"
    return Catch(SIDE_STREAM, name, (FARSKIP_WIRING, False, side_stream))


def lanes_of(test: str, *arguments: Any) -> Catch:
    from farskip.lanes import SideStream

    return Catch(LANES, test, (*arguments, SideStream.merge_and_route))


MEGATRON_BITS = Catch(MEGATRON, "schedules", ([{}],), 2)
MEGATRON_CUT = Catch(MEGATRON, "cuts", ([{"wiring": "ladder", "kind": "dense"}],), 2)
MEGATRON_EQUATIONS = Catch(MEGATRON, "wirings", (["farskip"], ["input"], "all"), 2)
MEGATRON_ORDER = Catch(MEGATRON, "unchanged", (), 1)

TWO_ENDS = Catch(EARLIEST, "test_ladder_in_two_chunks_exposes_only_the_two_ends", (1.0, 0.25))
REDUCES_UNDER_WAY = "test_all_reduces_are_under_way_exactly_while_the_schedule_says_so"
FORWARD_UNDER_WAY = Catch(REDUCED, REDUCES_UNDER_WAY, ("ladder", "overlapped", "forward"))
BACKWARD_UNDER_WAY = Catch(REDUCED, REDUCES_UNDER_WAY, ("ladder", "overlapped", "backward"))

_CORE, _PARALLEL, _MODELS, _KERNELS = "farskip.", "farskip.parallel.", "farskip.models.", "farskip.triton_kernels."
_FINISH = _CORE + "async_autograd:InFlight._finish"
_FORM = _CORE + "residual:Residual._form"
_OFFER = _CORE + "residual:Residual._offer"
_USES = _CORE + "residual:stream_uses"
_FUSIONS = _CORE + "fusion:_fusions_behind"

MUTATIONS = [
    # waits
    Mutation(
        "no wait in forward",
        _FINISH,
        "pending.wait()",
        "pending.wait() if backward else pending.unfilled",
        slowest_link(),
    ),
    Mutation(
        "no wait in backward",
        _FINISH,
        "pending.wait()",
        "pending.unfilled if backward else pending.wait()",
        slowest_link(),
    ),
    Mutation("a wait that does not wait", _CORE + "pending:Pending.wait", "self._work.wait()", "pass", slowest_link()),
    Mutation(
        "a second wait waits again",
        _CORE + "pending:Pending.wait",
        "self._work = None",
        "pass",
        Catch(PENDING, "test_only_the_first_wait_waits"),
    ),
    Mutation(
        "the executor takes a result without its wait",
        _CORE + "executor:_SegmentRun._wait",
        "self._in_flight.pop(key).wait(self._rows.pop(key))",
        "self._rows.pop(key)",
        slowest_link(),
    ),
    Mutation(
        "the schedule forgets a wait",
        _CORE + "schedule:_overlapped",
        "steps.append(Instruction(Do.WAIT, in_flight[0]))",
        "pass",
        Catch(SCHEDULE, "test_nothing_runs_before_what_it_needs", (1, 2)),
    ),
    Mutation(
        "experts do not wait for dispatch",
        _CORE + "stage_graph:_layer_stages",
        "Stage(Key(layer, EXPERTS, chunk), (Key(layer, DISPATCH, chunk),))",
        "Stage(Key(layer, EXPERTS, chunk), (key(ROUTE),))",
        placements(FARSKIP_WIRING),
    ),
    Mutation(
        "merge does not wait for combine",
        _CORE + "stage_graph:_layer_stages",
        "Stage(key(MERGE), tuple(Key(layer, COMBINE, chunk) for chunk in range(chunks)))",
        "Stage(key(MERGE), tuple(Key(layer, EXPERTS, chunk) for chunk in range(chunks)))",
        placements(FARSKIP_WIRING),
    ),
    Mutation(
        "merge waits for the first chunk only",
        _CORE + "stage_graph:_layer_stages",
        "for chunk in range(chunks))))",
        "for chunk in range(1))))",
        placements(ORDINARY_WIRING, 2),
    ),
    Mutation(
        "x does not wait for the routed output",
        _CORE + "stage_graph:build_stage_graph",
        "_unique(before + tuple(key for keys in outputs.values() for key in keys))",
        "_unique(before)",
        Catch(SCHEDULE, "test_the_graph_needs_what_the_wiring_reads", (1,)),
    ),
    Mutation(
        "n waits for what it leaves out",
        _CORE + "stage_graph:build_stage_graph",
        "if block not in reads.left_out",
        "if True",
        Catch(SCHEDULE, "test_farskip_hides_each_collective_under_what_the_paper_says"),
    ),
    # kept references
    Mutation(
        "what is sent is not kept",
        _PARALLEL + "collectives:AllToAll.launch",
        "keep=(tensor,)",
        "keep=()",
        slowest_link(),
    ),
    Mutation(
        "Pending keeps nothing",
        _CORE + "pending:Pending.__init__",
        "self._keep = keep",
        "self._keep = ()",
        slowest_link(),
    ),
    Mutation(
        "what is sent is let go before the wait",
        _CORE + "pending:Pending.wait",
        "if self._meter is None:",
        "self._keep = ()\n        if self._meter is None:",
        slowest_link(),
    ),
    Mutation(
        "what was sent is never let go",
        _CORE + "pending:Pending.wait",
        "self._keep = ()",
        "pass",
        Catch(PENDING, "test_what_is_sent_lives_until_it_is_waited_for_and_no_longer"),
    ),
    Mutation(
        "the buffer of an all-reduce is not kept",
        _PARALLEL + "tensor_parallel:TensorParallelRanks.all_reduce",
        "Pending(tensor, ",
        "Pending(tensor.clone(), ",
        reduced(),
    ),
    # fan-out, one value at a time
    Mutation(
        "no fan-out of the full stream",
        _OFFER,
        "if self._fixed_order",
        "if self._fixed_order and value.name != 'x'",
        placements(FARSKIP_WIRING),
    ),
    # The next ones show in no model: of the orders that schedules choose today, none changes a sum there. Their rule is
    # tested by itself, so that it also holds for schedules to come.
    Mutation(
        "no fan-out of the stream behind attention",
        _OFFER,
        "if self._fixed_order",
        "if self._fixed_order and value.name != 'y'",
        Catch(RESIDUAL, "test_gradients_behind_attention_are_added_in_the_order_of_their_uses"),
    ),
    *(
        Mutation(
            f"no fan-out of the normed input {value}",
            _OFFER,
            "if self._fixed_order",
            f"if self._fixed_order and value.name != {value!r}",
            Catch(
                RESIDUAL,
                "test_gradients_of_a_normed_value_are_added_in_the_order_of_its_uses",
                (name, (("attention", "shared", "routed"),)),
            ),
        )
        for value, name in (("normed_x", "farskip"), ("normed_y", "ordinary"))
    ),
    Mutation("no fan-out at all", _OFFER, "if self._fixed_order", "if False", placements(FARSKIP_WIRING)),
    Mutation(
        "no fan-out in models",
        _CORE + "executor:_SegmentRun.__init__",
        "fixed_order=executor.graph.has_collectives",
        "fixed_order=False",
        slowest_link(),
    ),
    Mutation(
        "fan-out adds in reverse",
        _CORE + "async_autograd:_FanOut.backward",
        "for gradient in gradients",
        "for gradient in reversed(gradients)",
        Catch(ASYNC, "test_fan_out_adds_gradients_in_the_order_of_the_aliases", ((2, 0, 1),)),
    ),
    Mutation(
        "fan-out forgets its last alias",
        _CORE + "async_autograd:_FanOut.backward",
        "for gradient in gradients",
        "for gradient in gradients[:-1]",
        Catch(ASYNC, "test_an_alias_without_a_use_adds_nothing", (0,)),
    ),
    Mutation(
        "a stream's uses are not in program order",
        _USES,
        "full.insert(1 if ATTENTION in full else 0, ADD_Y)",
        "full.append(ADD_Y)",
        Catch(RESIDUAL, "test_uses_are_listed_in_program_order"),
    ),
    # sums formed together with norms
    Mutation(
        "both streams are updated at once with a routed output in flight",
        _CORE + "fusion:landed_layers",
        "< starts",
        "< starts + len(steps)",
        Catch(EXECUTOR, "test_every_placement_gives_the_bits_of_serial_with_kernels", (FARSKIP_WIRING, ())),
    ),
    Mutation(
        "routed outputs have landed before attention, not before its norm in front of a gather",
        _CORE + "fusion:landed_layers",
        "position.get(Key(key.layer, NORM[ATTENTION]), number)",
        "number",
        Catch("farskip/test_fusion.py", "test_under_sequence_parallelism_the_norm_of_attention_is_what_reads"),
    ),
    Mutation(
        "n is formed with y, and a norm that reads y waits for the shared expert",
        _FUSIONS,
        'base == "y+s" and not y_is_read',
        'base == "y+s"',
        Catch(FUSION, "test_which_op_forms_what", ("attn_only",)),
    ),
    Mutation(
        "what lies inside an op is handed out too",
        _FUSIONS,
        "{(y, ADD_N), (next_n, of_n.name)}",
        "set()",
        Catch(FUSION, "test_no_alias_of_the_steady_state_is_left_over"),
    ),
    Mutation(
        "a stream that leaves a segment is normed there",
        _CORE + "fusion:plan_fusions",
        "leaves = layer + 1 == stop",
        "leaves = layer + 1 == len(inputs)",
        Catch(FUSION, "test_what_leaves_a_segment_is_plain"),
    ),
    Mutation(
        "a stage is not left through what an op takes in",
        _CORE + "residual:Residual.form_normed",
        "self._run(fusion, mark)",
        "self._run(fusion, lambda *terms: terms)",
        Catch(FUSION, "test_no_alias_of_the_steady_state_is_left_over"),
    ),
    Mutation(
        "wider rows are not merged first",
        _CORE + "residual:Residual.takes_rows",
        "torch.promote_types(rows[0].dtype, self._dtype) == self._dtype",
        "True",
        Catch(FUSION, "test_wider_rows_and_rows_in_pieces_are_merged_first"),
    ),
    Mutation(
        "rows in pieces are not merged first",
        _CORE + "residual:Residual.takes_rows",
        "len(rows) > 1",
        "False",
        Catch(FUSION, "test_wider_rows_and_rows_in_pieces_are_merged_first"),
    ),
    Mutation(
        "routed rows are summed without their weights",
        _PARALLEL + "dispatcher:AllToAllDispatcher.unmerged",
        "routing.weights_TK if",
        "None if",
        ROWS_GRID,
    ),
    Mutation(
        "the weights of routed rows are not left through",
        _CORE + "residual:_marked",
        "[term.rows_RD] if term.weights_TK is None else [term.rows_RD, term.weights_TK]",
        "[term.rows_RD, *([] if term.weights_TK is None else [term.weights_TK.detach()])]",
        ROWS_GRID,
    ),
    Mutation(
        "the gradient of rows is added behind the shared expert's",
        _KERNELS + "release_router_reference:release_router_backward_reference",
        "(before_TH, summed, after_TH)",
        "(before_TH, after_TH, summed)",
        ROWS_GRID,
    ),
    Mutation(
        "the gradient of rows is forgotten",
        _KERNELS + "release_router_reference:release_router_backward_reference",
        "(before_TH, summed, after_TH)",
        "(before_TH, after_TH)",
        ROWS_GRID,
    ),
    Mutation(
        "the gradient of rows in pieces is laid aside",
        _PARALLEL + "dispatcher:AllToAllDispatcher._permute",
        "if gradient is None or len(sizes) > 1:",
        "if gradient is None:",
        Catch("parallel/test_weight_on_input.py", "test_the_gradient_of_one_piece_goes_beside_autograd", (2,)),
    ),
    Mutation(
        "rows are widened before they are summed",
        _KERNELS + "release_router_reference:release_router_reference",
        "unpermute_reference(routed, dst_TK, combine_TK)",
        "unpermute_reference(routed.to(y_TH.dtype), dst_TK, combine_TK)",
        Catch(STREAM_KERNELS, "test_under_autocast_rows_have_the_bits_of_merged_tokens", ("farskip",)),
    ),
    Mutation(
        "the gradient of rows is widened before it is summed",
        _KERNELS + "release_router_reference:release_router_backward_reference",
        "unpermute_reference(rows, dst_TK, None)",
        "unpermute_reference(rows.to(x_TH.dtype), dst_TK, None)",
        Catch(STREAM_KERNELS, "test_under_autocast_rows_have_the_bits_of_merged_tokens", ("farskip",)),
    ),
    Mutation(
        "a second reader of what is copied to rows is lost",
        _CORE + "rows_gradient:RowsGradient.take",
        "if arrived.data_ptr() != placeholder.data_ptr():",
        "if False:",
        Catch(ROWS_GRADIENT, "test_a_second_reader_is_refused"),
    ),
    Mutation(
        "the gradient of rows is taken twice",
        _CORE + "rows_gradient:RowsGradient.take",
        "self._laid_aside = None",
        "pass",
        Catch(ROWS_GRADIENT, "test_rows_arrive_unsummed_behind_a_placeholder"),
    ),
    Mutation(
        "the gradient of rows is laid aside twice",
        _CORE + "rows_gradient:RowsGradient._lay_aside",
        "self._laid_aside is None",
        "True",
        Catch(ROWS_GRADIENT, "test_two_copies_of_one_tensor_are_refused"),
    ),
    Mutation(
        "the placeholder for rows is zero, not NaN",
        _CORE + "rows_gradient:_Copy.backward",
        'float("nan")',
        "0.0",
        Catch(ROWS_GRADIENT, "test_rows_arrive_unsummed_behind_a_placeholder"),
    ),
    Mutation(
        "a hook on a norm is not called",
        _MODELS + "norm_rule:why_called",
        "if norm._forward_hooks or",
        "if",
        Catch(STREAM_KERNELS, "test_a_hook_on_a_norm_is_called"),
    ),
    # the side lane
    Mutation(
        "what is put aside is issued beside compute",
        _CORE + "executor:_SegmentRun._advance",
        "with self._lane.entered():",
        "with nullcontext():",
        aside(),
    ),
    Mutation(
        "a lane does not wait for values of the other",
        _CORE + "residual:Residual._take",
        "self._lane.read(self._marks[value], *tensors_in(alias))",
        "self._lane.keep(*tensors_in(alias))",
        aside(),
    ),
    Mutation(
        "values of the other lane are not kept",
        _CORE + "residual:Residual._take",
        "self._lane.read(self._marks[value], *tensors_in(alias))",
        "self._lane.read(self._marks[value])",
        aside(),
    ),
    Mutation(
        "a lane takes rows without going behind the one that launched them",
        _CORE + "executor:_SegmentRun._wait",
        "self._lane.read(self._marks.pop(key))",
        "self._marks.pop(key)",
        aside(),
    ),
    Mutation("rows that crossed are not kept", _FINISH, "self._keep(*tensors)", "self._keep(*tensors[1:])", aside()),
    Mutation("rows that were sent are not kept", _FINISH, "self._keep(*tensors)", "self._keep(tensors[0])", aside()),
    Mutation(
        "gradients of rows that crossed are not kept",
        _FINISH,
        "self._keep(*tensors)",
        "backward or self._keep(*tensors)",
        aside(),
    ),
    Mutation(
        "experts do not keep their plan",
        _CORE + "executor:_SegmentRun._experts",
        "self._lane.keep(plan.expert_R)",
        "pass",
        aside(),
    ),
    Mutation(
        "merge does not keep its plans",
        _CORE + "executor:_SegmentRun._merge",
        "self._lane.keep(*tensors_in((plans, routing)))",
        "pass",
        aside("merge"),
    ),
    Mutation(
        "a segment is recomputed in the lane that asks for it",
        _CORE + "executor:Executor.run_segment",
        "nullcontext() if lane is None else lane.at(home)",
        "nullcontext()",
        Catch(
            SIDE_STREAM,
            "test_chunks_segments_and_recomputation_give_the_bits_of_overlapped_without_a_race",
            (FARSKIP_WIRING, True, "merge_and_route"),
        ),
    ),
    Mutation(
        "a stream waits for no mark of another",
        _CORE + "side_stream:CudaSideLane.read",
        "mark.stream == here",
        "True",
        Catch(SIDE_STREAM, "test_a_read_waits_for_the_other_stream_and_keeps_what_it_reads"),
    ),
    Mutation(
        "a stream does not keep what it reads of another",
        _CORE + "side_stream:CudaSideLane.read",
        "self.keep(*tensors)",
        "pass",
        Catch(SIDE_STREAM, "test_a_read_waits_for_the_other_stream_and_keeps_what_it_reads"),
    ),
    Mutation(
        "what a stream keeps is not marked",
        _CORE + "side_stream:CudaSideLane.keep",
        "tensor.record_stream(here)",
        "pass",
        Catch(SIDE_STREAM, "test_a_read_waits_for_the_other_stream_and_keeps_what_it_reads"),
    ),
    Mutation(
        "nobody waits for a recomputation on another stream",
        _CORE + "side_stream:CudaSideLane.at",
        "here.wait_stream(mark.stream)",
        "pass",
        Catch(SIDE_STREAM, "test_a_recomputation_goes_home_and_whoever_asked_for_it_waits"),
    ),
    Mutation(
        "what the side stream waits for counts as exposed",
        _CORE + "wait_meter:WaitMeter.timed",
        "torch.cuda.current_stream(device) in self._left_out",
        "False",
        Catch(SIDE_STREAM, "test_the_meter_counts_what_compute_waits_for_and_not_what_the_side_lane_waits_for"),
    ),
    Mutation(
        "no stage goes behind one of the other lane",
        _CORE + "lanes:put_aside",
        "position[behind] <= waited_for[side]",
        "True",
        lanes_of("test_what_needs_a_stage_of_the_other_lane_is_behind_it", FARSKIP_WIRING),
    ),
    Mutation(
        "compute does not go behind a router that may have formed its sum",
        _CORE + "lanes:put_aside",
        "last_router if key.stage in _READS_STREAM else ()",
        "()",
        Catch(LANES, "test_compute_that_reads_the_stream_goes_behind_the_router_before_it"),
    ),
    Mutation(
        "a segment begins before the side lane of the one before it has ended",
        _CORE + "lanes:put_aside",
        "needed += edge[not side]",
        "pass",
        lanes_of("test_a_segment_begins_behind_both_lanes_of_the_one_before_it"),
    ),
    Mutation(
        "backward forgets what goes behind what",
        _CORE + "schedule:mirror",
        "behind.get(step.key) if step.do is Do.RUN else None",
        "None",
        lanes_of("test_a_side_lane_changes_no_order", FARSKIP_WIRING),
    ),
    Mutation(
        "a wait in the side lane holds compute",
        _CORE + "simulator:simulate",
        "free[step.side] = max(free[step.side], done_at[step.key])",
        "free[False] = max(free[False], done_at[step.key])",
        lanes_of("test_three_lanes_do_one_thing_at_a_time_and_account_for_all_time", FARSKIP_WIRING),
    ),
    # backward order
    Mutation(
        "backward launches and waits at once",
        _CORE + "async_autograd:InFlight._start",
        "return self._pending.unfilled",
        "backward and self._pending.wait(); return self._pending.unfilled",
        UNDER_WAY,
    ),
    Mutation(
        "forward launches and waits at once",
        _CORE + "async_autograd:InFlight._start",
        "return self._pending.unfilled",
        "backward or self._pending.wait(); return self._pending.unfilled",
        UNDER_WAY,
    ),
    Mutation("backward is the forward list", _CORE + "schedule:mirror", "reversed(forward)", "forward", RECORDED),
    Mutation("backward exchanges nothing", _CORE + "schedule:mirror", "exchanged[step.do]", "step.do", RECORDED),
    Mutation(
        "the placeholder is zero, not NaN",
        _CORE + "async_autograd:_Wait.backward",
        'float("nan")',
        "0.0",
        Catch(ASYNC, "test_what_lies_between_launch_and_wait_is_undefined_and_never_read"),
    ),
    Mutation(
        "the placeholder is read",
        _CORE + "async_autograd:_Launch.backward",
        "ctx.in_flight._finish(backward=True)",
        "ctx.in_flight._finish(backward=True) + placeholder.mean()",
        slowest_link(),
    ),
    Mutation(
        "the seam runs nothing",
        _CORE + "executor:_SegmentRun._attention",
        "self._advance(until=core)",
        "pass",
        Catch(EXECUTOR, "test_every_placement_gives_the_bits_of_serial", (FARSKIP_WIRING, 1)),
    ),
    Mutation(
        "recomputation stops early",
        _CORE + "executor:Executor.run_segment",
        "set_checkpoint_early_stop(False)",
        "set_checkpoint_early_stop(True)",
        Catch(EXECUTOR, "test_whatever_begins_also_ends_before_the_next_begins", (1, True, False)),
    ),
    Mutation(
        "a strided gradient is sent as it is",
        _CORE + "async_autograd:InFlight._start",
        "tensor.contiguous()",
        "tensor",
        Catch(ASYNC, "test_a_strided_gradient_is_made_contiguous_before_it_is_sent"),
    ),
    # the function
    Mutation(
        "another bracketing: (y + r) + s",
        _FORM,
        "y_BSD + (routed_BSD + self._take(Value(before, SHARED), ADD_X))",
        "(y_BSD + routed_BSD) + self._take(Value(before, SHARED), ADD_X)",
        UNTOUCHED,
    ),
    Mutation(
        "another bracketing: y + (s + r), as x + (a + s) + r",
        _FORM,
        "y_BSD + (routed_BSD + self._take(Value(before, SHARED), ADD_X))",
        "(y_BSD + self._take(Value(before, SHARED), ADD_X)) + routed_BSD",
        Catch(RESIDUAL, "test_the_full_stream_is_bracketed_as_in_ordinary_models", (0, 2)),
    ),
    Mutation(
        "n leaves out the shared expert too",
        _FORM,
        'return y_BSD if base == "y" else',
        "return y_BSD if True else",
        REFERENCE,
    ),
    Mutation(
        "ladder keeps the shared expert",
        _CORE + "residual:partial_base",
        "SHARED in blocks and SHARED not in left_out",
        "SHARED in blocks",
        LADDER_REFERENCE,
    ),
    Mutation(
        "attention reads x",
        _CORE + "executor:_SegmentRun._attention",
        "self._executor.inputs[layer].source(ATTENTION)",
        "Source.FULL",
        REFERENCE,
    ),
    Mutation(
        "the shared expert reads another stream",
        _CORE + "executor:_SegmentRun._simple",
        "self._executor.inputs[key.layer].source(block)",
        "Source.AFTER_ATTENTION",
        REFERENCE,
    ),
    Mutation(
        "attention runs unmasked",
        _MODELS + "attention_seam:install_seam",
        "masks[name]",
        "lambda *a, **k: None",
        Catch(ORDINARY, "test_logits_and_gradients", ("qwen3_moe", "eager")),
    ),
    Mutation(
        "norm of attention before the MLP",
        _MODELS + "hf_layer:HFSubBlocks.mlp_norm",
        "self.norms[MLP_NORM]",
        "self.norms[ATTENTION]",
        UNTOUCHED,
    ),
    # what is refused
    Mutation(
        "a left-out set may be any",
        _CORE + "wiring:_resolve_layer",
        "older != previous[len(previous) - len(older) :]",
        "False",
        Catch(
            "farskip/test_wiring.py",
            "test_a_left_out_set_that_is_no_suffix_is_refused_with_the_reason",
            (
                (("attention", "shared", "routed"), ("attention", "routed")),
                {"attention": ("previous.shared",)},
                "reads the newer ['routed']",
            ),
        ),
    ),
    Mutation(
        "a third stream may cross",
        _CORE + "wiring:_resolve_layer",
        "len(streams) > 1",
        "False",
        Catch("farskip/test_wiring.py", "test_a_third_stream_is_refused_with_the_reason"),
    ),
    Mutation(
        "hidden states may be replaced",
        _MODELS + "attach:_Call.layer",
        "hidden_BSD is not self._returned",
        "False",
        Catch(WIRINGS, "test_a_hook_that_replaces_hidden_states_between_layers_is_refused"),
    ),
    Mutation(
        "layers may be missing",
        _MODELS + "attach:Attachment.before_backbone",
        "len(layers) != self.executor.num_layers",
        "False",
        Catch(WIRINGS, "test_a_model_that_stops_early_is_refused"),
    ),
    Mutation(
        "reentrant checkpointing is let through",
        _MODELS + "attach:_refuse_reentrant",
        'keywords.get("use_reentrant")',
        "False",
        Catch(WIRINGS, "test_reentrant_checkpointing_is_refused"),
    ),
    # dispatch
    Mutation(
        "the sort of rows is not stable",
        _KERNELS + "dispatch_map_reference:dispatch_map_reference",
        "torch.sort(ids_S, stable=True)",
        "(lambda back: (back[0], num_slots - 1 - back[1]))(torch.sort(ids_S.flip(0), stable=True))",
        Catch(DISPATCHER, "test_rows_of_one_expert_keep_the_order_of_their_tokens"),
    ),
    Mutation(
        "gradients of rows go to other tokens",
        _KERNELS + "unpermute:_backward_permute",
        "grad.contiguous()",
        "grad.flip(0)",
        ONE_RANK,
    ),
    Mutation(
        "rows come back in another order",
        _PARALLEL + "dispatcher:AllToAllDispatcher.merge",
        "unpermute(chunk_RD, ",
        "unpermute(chunk_RD.flip(0), ",
        ONE_RANK,
    ),
    Mutation(
        "the reordering's gradient is not the inverse",
        _KERNELS + "unpermute_reference:unpermute_backward_reference",
        "permute_reference(grad_TH, dst_TK, src_R, ",
        "permute_reference(grad_TH, dst_TK, src_R.flip(0), ",
        ONE_RANK,
    ),
    Mutation(
        "weights are not applied",
        _PARALLEL + "dispatcher:AllToAllDispatcher.merge",
        "routing.weights_TK[first:stop] if",
        "None if",
        ONE_RANK,
    ),
    Mutation(
        "the way back has the splits of the way there",
        _PARALLEL + "collectives:AllToAll.reverse",
        "input_splits=self.output_splits, output_splits=self.input_splits",
        "input_splits=self.input_splits, output_splits=self.output_splits",
        Catch(DISPATCHER, "uneven_splits_swap", (), 2),
    ),
    Mutation(
        "arriving rows are counted by expert, not by rank",
        _PARALLEL + "dispatcher:AllToAllDispatcher._exact_plan",
        ".repeat(self.link.size)",
        ".repeat_interleave(self.link.size)",
        Catch(DISPATCHER, "arriving_rows_know_their_expert", (), 2),
    ),
    Mutation(
        "counts are read before they have arrived",
        _PARALLEL + "host_counts:_OnCpu.read",
        "self._received.wait()",
        "self._received.unfilled",
        slowest_link(),
    ),
    Mutation(
        "the host waits for counts before the rows are copied",
        _PARALLEL + "dispatcher:AllToAllDispatcher.prepare",
        "rows = self._permute(maps, tokens_TD, routing, sizes, gradient)\n"
        "    received_W, (input_splits, output_splits) = under_way.read()",
        "received_W, (input_splits, output_splits) = under_way.read()\n"
        "    rows = self._permute(maps, tokens_TD, routing, sizes, gradient)",
        Catch(DISPATCHER, "test_one_read_behind_the_copy_of_rows", (2,)),
    ),
    Mutation(
        "the stream of counts does not wait for what they were made of",
        _PARALLEL + "host_counts:CudaCounts.begin",
        "self._stream.wait_stream(torch.cuda.current_stream(self._device))",
        "pass",
        ON_STREAMS,
    ),
    Mutation(
        "counts come to the host on compute's stream",
        _PARALLEL + "host_counts:CudaCounts.begin",
        "with torch.cuda.stream(self._stream):",
        "if True:",
        ON_STREAMS,
    ),
    Mutation(
        "the host waits for the copy of counts where it begins",
        _PARALLEL + "host_counts:CudaCounts.begin",
        ", non_blocking=True",
        ", non_blocking=False",
        ON_STREAMS,
    ),
    Mutation(
        "counts are let go while they are copied",
        _PARALLEL + "host_counts:CudaCounts.begin",
        "(sizes, on_device)",
        "()",
        ON_STREAMS,
    ),
    Mutation(
        "compute does not wait for the counts it reads",
        _PARALLEL + "host_counts:_OnCuda.read",
        "self._meter.timed(lambda: here.wait_event(self._arrived), self._device)",
        "pass",
        ON_STREAMS,
    ),
    Mutation(
        "the host does not wait for counts on their way from a device",
        _PARALLEL + "host_counts:_OnCuda.read",
        "self._arrived.synchronize()",
        "pass",
        ON_STREAMS,
    ),
    Mutation(
        "padding holds rows of the next expert",
        _PARALLEL + "dispatcher:AllToAllDispatcher._padded",
        "torch.where(held_EC, dispatch.src[tight_EC], -1)",
        "dispatch.src[tight_EC]",
        Catch(DISPATCHER, "test_a_fixed_capacity_needs_no_counts"),
    ),
    Mutation(
        "experts lie on other ranks",
        _MODELS + "parallelize:_shard_experts",
        "rank * local : (rank + 1) * local",
        "(size - 1 - rank) * local : (size - rank) * local",
        POINT,
    ),
    Mutation(
        "an idle rank cuts its graph",
        _MODELS + "hf_layer:HFSubBlocks.expert_rows",
        "return rows_RD + 0.0 *",
        "return rows_RD.detach() + 0.0 *",
        NO_ROWS,
    ),
    Mutation(
        "an idle expert has no gradient",
        _MODELS + "hf_layer:HFSubBlocks.expert_rows",
        "for parameter in experts.parameters())",
        "for parameter in ())",
        NO_ROWS,
    ),
    # gradients over ranks
    Mutation(
        "expert gradients are reduced twice",
        _PARALLEL + "data_parallel:DataParallel.__init__",
        "if axis_size(mesh, REPLICA_AXIS) > 1:",
        "summed.append((self._expert_parameters, None))\n    if axis_size(mesh, REPLICA_AXIS) > 1:",
        SUMS,
    ),
    Mutation(
        "replicas of experts are not reduced",
        _PARALLEL + "data_parallel:DataParallel.__init__",
        "if axis_size(mesh, REPLICA_AXIS) > 1:",
        "if False:",
        SUMS,
    ),
    Mutation(
        "replicated gradients are not reduced",
        _PARALLEL + "data_parallel:DataParallel.__init__",
        "([*self._replicated_parameters, *self._sliced_parameters], self._data_group)",
        "([], None)",
        SUMS,
    ),
    Mutation(
        "the norm counts replicated parameters on every rank",
        _PARALLEL + "data_parallel:DataParallel.clip_gradients",
        "dist.all_reduce(squares[row]",
        "dist.all_reduce(squares",
        NORM,
    ),
    Mutation(
        "the norm counts experts once per replica",
        _PARALLEL + "data_parallel:DataParallel.clip_gradients",
        "group=axis_group(self._mesh, axis)",
        "group=None",
        NORM,
    ),
    Mutation(
        "the norm forgets the experts of other ranks",
        _PARALLEL + "data_parallel:DataParallel.clip_gradients",
        "if parameters and",
        "if False and",
        NORM,
    ),
    Mutation(
        "clipping forgets the experts",
        _PARALLEL + "data_parallel:DataParallel.clip_gradients",
        "(*everywhere, *self._expert_parameters, *self._sliced_parameters)",
        "(*everywhere, *self._sliced_parameters)",
        NORM,
    ),
    Mutation(
        "a gradient that is missing on a rank is left out of the sum",
        _PARALLEL + "gradient_sums:_Bucket.put",
        "elif bool(count):",
        "elif False:",
        Catch(DATA_PARALLEL, "absent_gradients", (), 2),
    ),
    Mutation(
        "a gradient that no rank has becomes zero",
        _PARALLEL + "gradient_sums:_Bucket.put",
        "elif bool(count):",
        "else:",
        Catch(DATA_PARALLEL, "absent_gradients", (), 2),
    ),
    Mutation(
        "a sum of gradients is read before it is there",
        _PARALLEL + "gradient_sums:_Bucket.put",
        "self.pending.wait()",
        "self.pending.unfilled",
        EARLY_SUMS,
    ),
    Mutation(
        "a gradient that changed after it was sent is overwritten",
        _PARALLEL + "gradient_sums:_Bucket.changed",
        "gradient._version != version",
        "False",
        Catch(GRADIENT_SUMS, "changed_by", ("in place", False), 2),
    ),
    Mutation(
        "a gradient that changed after its sum was put in place goes unnoticed",
        _PARALLEL + "gradient_sums:GradientSums.finish",
        "self._changed += bucket.changed()",
        "pass",
        Catch(GRADIENT_SUMS, "changed_by", ("in place", True), 2),
    ),
    Mutation(
        "sums that have arrived are kept beside the gradients",
        _PARALLEL + "gradient_sums:GradientSums._gradient_is_there",
        "self._put_next()",
        "break",
        Catch(GRADIENT_SUMS, "most_under_backward", (), 2),
    ),
    Mutation(
        "gradients are sent before all of a bucket are there",
        _PARALLEL + "gradient_sums:GradientSums._gradient_is_there",
        "not self._buckets[self._num_launched].unfinished",
        "True",
        EARLY_SUMS,
    ),
    Mutation(
        "gradients are sent before the last backward",
        _PARALLEL + "gradient_sums:GradientSums._gradient_is_there",
        "not self._expecting or ",
        "",
        EARLY_SUMS,
    ),
    Mutation(
        "a bucket is sent as soon as it is complete, whatever the order on other ranks",
        _PARALLEL + "gradient_sums:GradientSums._gradient_is_there",
        "while self._num_launched < len(self._buckets) and not self._buckets[self._num_launched].unfinished:\n"
        "        while self._num_put < self._num_launched and self._buckets[self._num_put].has_arrived():\n"
        "            self._put_next()\n"
        "        self._launch_next()",
        "if not bucket.unfinished:\n        self._buckets.remove(bucket)\n"
        "        self._buckets.insert(self._num_launched, bucket)\n        self._launch_next()",
        Catch(GRADIENT_SUMS, "other_order_on_every_rank", (), 2),
    ),
    Mutation(
        "sums of gradients queue behind what the schedule has in flight",
        _PARALLEL + "gradient_sums:GradientSums._plan",
        "another_group(self._ranks)",
        "self._ranks or dist.group.WORLD",
        Catch(GRADIENT_SUMS, "beside_what_is_in_flight", (), 2),
    ),
    Mutation(
        "the share of another rank is read before it is there",
        _PARALLEL + "optimizer_shares:_Bucket.finish",
        "self._pending.wait()",
        "self._pending.unfilled",
        DIVIDED,
    ),
    Mutation(
        "the last shares on their way are forgotten",
        _PARALLEL + "optimizer_shares:OptimizerShares.finish",
        "for bucket in under_way:",
        "for bucket in ():",
        DIVIDED,
    ),
    Mutation(
        "a share gets the gradient of the first one",
        _PARALLEL + "optimizer_shares:_Share.take",
        "self._rank * self.longest, here",
        "0, here",
        DIVIDED,
    ),
    Mutation(
        "a share that was copied is not put back",
        _PARALLEL + "optimizer_shares:_Share.put_back",
        "here.copy_(self.mine)",
        "pass",
        DIVIDED,
    ),
    Mutation(
        "a copy of a share stays when it has been put back",
        _PARALLEL + "optimizer_shares:_Share.put_back",
        "self.mine.data, self.mine.grad = here, None",
        "self.mine.grad = None",
        Catch(OPTIMIZER_SHARES, "kept", (2, 1), 2),
    ),
    Mutation(
        "a checkpoint takes slices with other experts for copies",
        _PARALLEL + "optimizer_shares:OptimizerShares.wrap_for_checkpoint",
        "Shard(slices.dim) if slices.axes else Replicate()",
        "Replicate()",
        DIVIDED,
    ),
    # tensor parallelism: waits
    Mutation(
        "the stream is filled without a wait",
        _CORE + "reduced_residual:ReducedResidual.wait",
        "summed_BSD = pending.wait()",
        "summed_BSD = pending.unfilled",
        reduced(),
    ),
    Mutation(
        "a reduced gradient is taken without a wait",
        _CORE + "reduction_autograd:GradientSum._wait",
        "self._sum = pending.wait()",
        "self._sum = pending.unfilled",
        reduced(),
    ),
    Mutation(
        "the next sub-block does not wait for the stream",
        _CORE + "stage_graph:_reduced_graph",
        "(made_by,) if made_by is not None else ()",
        "()",
        reduced(),
    ),
    Mutation(
        "an all-reduce does not wait for all that it carries",
        _CORE + "stage_graph:_reduced_graph",
        "tuple(key for block in group for key in made[block])",
        "tuple(made[group[0]])",
        reduced("parallel"),
    ),
    Mutation(
        "outputs are waited for where their all-reduce is launched",
        _CORE + "reduced_residual:ReducedResidual.launch",
        "self._newest = point",
        "self._newest = point; pending.wait()",
        FORWARD_UNDER_WAY,
    ),
    Mutation(
        "gradients are waited for where their all-reduce is launched",
        _CORE + "reduction_autograd:GradientSum.arrive",
        "if self._blocking:",
        "if True:",
        BACKWARD_UNDER_WAY,
    ),
    Mutation(
        "a sum inside a sub-block is taken without a wait",
        _CORE + "reduction_autograd:_SumOverRanks.forward",
        ".wait()",
        ".unfilled",
        Catch(REDUCTION, "test_a_sum_inside_a_sub_block_is_waited_for_where_it_stands"),
    ),
    Mutation(
        "its gradient is taken without a wait",
        _CORE + "reduction_autograd:_SumOverRanks.backward",
        ".wait()",
        ".unfilled",
        Catch(REDUCTION, "test_a_sum_inside_a_sub_block_is_waited_for_where_it_stands"),
    ),
    Mutation(
        "its gradient is not summed",
        _CORE + "reduction_autograd:_SumOverRanks.backward",
        "ctx.ranks.all_reduce(gradient.clone(memory_format=torch.contiguous_format)).wait()",
        "gradient",
        tensor_point(case="olmoe"),
    ),
    # tensor parallelism: taps and joins
    Mutation(
        "a tap hands its gradient to autograd too",
        _CORE + "reduction_autograd:_Tap.backward",
        "return None, None, None",
        "return gradient, None, None",
        reduced(),
    ),
    Mutation(
        "a tap keeps its gradient",
        _CORE + "reduction_autograd:_Tap.backward",
        "ctx.gradients.arrive(ctx.number, gradient)",
        "pass",
        reduced(),
    ),
    Mutation(
        "the last tap leaves the launch to the join",
        _CORE + "reduction_autograd:GradientSum.arrive",
        "if len(self._arrived) == self._num_taps:",
        "if False:",
        BACKWARD_UNDER_WAY,
    ),
    Mutation(
        "the first of two taps launches",
        _CORE + "reduction_autograd:GradientSum.arrive",
        "if len(self._arrived) == self._num_taps:",
        "if self._arrived:",
        reduced("parallel"),
    ),
    Mutation(
        "taps are added as they come",
        _CORE + "reduction_autograd:GradientSum._launch",
        "for tap in sorted(self._arrived)",
        "for tap in self._arrived",
        Catch(REDUCTION, "test_gradients_of_taps_are_added_in_the_order_of_the_taps"),
    ),
    Mutation(
        "a join forgets the gradient of what it adds",
        _CORE + "reduction_autograd:_Join.backward",
        "return total, total, None",
        "return total, None, None",
        reduced(),
    ),
    Mutation(
        "a join forgets its readers",
        _CORE + "reduced_residual:ReducedResidual.launch",
        "join(self._streams[before], partial_BSD, self._gradients.get(point))",
        "join(self._streams[before], partial_BSD, None)",
        reduced(),
    ),
    Mutation(
        "the entry of a segment forgets its readers",
        _CORE + "reduced_residual:ReducedResidual.__init__",
        "enter(entering_BSD, self._gradients.get(point))",
        "enter(entering_BSD, None)",
        reduced(),
    ),
    Mutation(
        "the stream is kept to the end",
        _CORE + "reduced_residual:ReducedResidual._use",
        "if self._uses_left[point] else",
        "if True else",
        Catch(REDUCED, "test_the_stream_is_let_go_point_by_point"),
    ),
    # tensor parallelism: orders and groups
    Mutation(
        "backward under tensor parallelism is the mirror",
        _CORE + "schedule:build_schedule",
        "if graph.chain is None:",
        "if True:",
        reduced(),
    ),
    Mutation(
        "a join is thought to be made at its wait",
        _CORE + "autograd_order:_nodes",
        "if key in points:\n            if step.do is Do.LAUNCH:",
        "if key in points:\n            if step.do is Do.WAIT:",
        reduced(),
    ),
    Mutation(
        "autograd is thought to run the oldest node first",
        _CORE + "autograd_order:autograd_order",
        "heapq.heappush(ready, (-created[read], read))",
        "heapq.heappush(ready, (created[read], read))",
        reduced(),
    ),
    Mutation(
        "an all-reduce overtakes the one before it",
        _CORE + "schedule:_overlapped",
        "number != reductions[0]",
        "False",
        Catch(CHAIN, "test_all_reduces_are_launched_in_the_order_of_the_stream", ("farskip",)),
    ),
    Mutation(
        "outputs that are read apart share an all-reduce",
        _CORE + "chain:_groups",
        "if left_out:",
        "if False:",
        Catch(CHAIN, "test_ladder_hides_each_all_reduce_behind_the_next_sub_block_in_both_directions"),
    ),
    Mutation(
        "the shared expert waits behind the routed ones",
        _CORE + "stage_graph:_reduced_graph",
        "if not chunks:",
        "if False:",
        Catch(CHAIN, "test_farskip_reduces_attention_and_shared_expert_together_under_the_routed_experts"),
    ),
    # tensor parallelism: between ranks
    Mutation(
        "partial gradients are not summed over the ranks",
        _PARALLEL + "data_parallel:DataParallel.__init__",
        "(self._partial_parameters, dist.group.WORLD)",
        "([], None)",
        tensor_point(case="llama"),
    ),
    Mutation(
        "whole gradients are summed over tp",
        _PARALLEL + "data_parallel:DataParallel.__init__",
        "self._sliced_parameters], self._data_group)",
        "self._sliced_parameters], None)",
        tensor_point(case="llama"),
    ),
    Mutation(
        "the norm forgets the slices of other ranks",
        _PARALLEL + "data_parallel:DataParallel.clip_gradients",
        "TP_AXIS: self._sliced_parameters",
        "TP_AXIS: []",
        tensor_point(case="llama"),
    ),
    Mutation(
        "clipping forgets the slices",
        _PARALLEL + "data_parallel:DataParallel.clip_gradients",
        "(*everywhere, *self._expert_parameters, *self._sliced_parameters)",
        "(*everywhere, *self._expert_parameters)",
        tensor_point(case="llama"),
    ),
    Mutation(
        "every rank adds the bias of a row-parallel projection",
        _MODELS + "tensor_parallel:cut_tensors",
        "module.bias is not None and rank",
        "False",
        tensor_point(case="llama-biased-tied"),
    ),
    Mutation(
        "every rank routes all tokens",
        _CORE + "executor:_SegmentRun._tokens",
        "return total * ranks.rank // ranks.size, total * (ranks.rank + 1) // ranks.size, total",
        "return 0, total, total",
        tensor_point(case="qwen3_moe"),
    ),
    Mutation(
        "a norm over all heads reads the rank's own",
        _MODELS + "sliced_norm:SlicedRMSNorm.forward",
        "self._sum(x32_BSH.pow(2).sum(-1, keepdim=True))",
        "2 * x32_BSH.pow(2).sum(-1, keepdim=True)",
        tensor_point(case="olmoe"),
    ),
    Mutation(
        "norms over all heads queue behind the schedule's all-reduces",
        _MODELS + "parallelize:parallelize",
        "another_group(axis_group(mesh, TP_AXIS))",
        "axis_group(mesh, TP_AXIS)",
        Catch("models/test_sliced_norm.py", "norms_beside_what_is_in_flight", (), 2),
    ),
    # sequence parallelism
    *(
        Mutation(
            f"what is {verb} is not kept",
            _PARALLEL + f"collectives:{kind}.launch",
            "keep=(tensor,)",
            "keep=()",
            SHARES_ON_LATE_LINKS,
        )
        for verb, kind in (("gathered", "AllGather"), ("scattered", "ReduceScatter"))
    ),
    Mutation(
        "a gather is its own gradient",
        _PARALLEL + "collectives:AllGather.reverse",
        "ReduceScatter(link=self.link)",
        "self",
        Catch(TENSOR_LINKS, "gathered_and_scattered", (), 3),
    ),
    Mutation(
        "a sub-block does not wait for its gather",
        _CORE + "stage_graph:_layer_stages",
        "(*(add(GATHER[block], after, chunk) if sequence_chunks else after), *before)",
        "(*((add(GATHER[block], after, chunk), after)[1] if sequence_chunks else after), *before)",
        sharded(),
    ),
    Mutation(
        "the stream does not wait for a scatter",
        _CORE + "stage_graph:_layer_stages",
        "outputs[block] += add(SCATTER[block], last, chunk) if sequence_chunks else last",
        "outputs[block] += (add(SCATTER[block], last, chunk), last)[1] if sequence_chunks else last",
        sharded(),
    ),
    Mutation(
        "the stream behind attention does not wait for its scatter",
        _CORE + "stage_graph:build_stage_graph",
        "SCATTER[ATTENTION] if sequence_chunks else ATTENTION_CORE",
        "ATTENTION_CORE",
        sharded("ordinary"),
    ),
    Mutation(
        "an output is handed on with its first chunk",
        _CORE + "executor:_SegmentRun._put_part",
        "self._shards.chunks if chunked else 1",
        "1",
        sharded(),
    ),
    Mutation(
        "chunks are joined as they arrive, whatever their numbers",
        _CORE + "executor:_SegmentRun._put_part",
        "for chunk in sorted(parts)",
        "for chunk in reversed(sorted(parts))",
        sharded(),
    ),
    Mutation(
        "the list by earliest start forgets its waits",
        _CORE + "earliest_start:earliest_start",
        "steps.append(Instruction(Do.WAIT, key))",
        "pass",
        TWO_ENDS,
    ),
    Mutation(
        "what a launch hangs on has no precedence",
        _CORE + "earliest_start:earliest_start",
        "not is_fed(number), number",
        "number",
        Catch(EARLIEST, "test_more_chunks_than_two_still_hide_everything_between_the_ends"),
    ),
    Mutation(
        "the list goes by program order, not by what can start",
        _CORE + "earliest_start:earliest_start",
        "(start(number), not",
        "(not",
        Catch(EARLIEST, "test_compute_stands_still_only_if_no_stage_could_start"),
    ),
    Mutation(
        "rows of zeros come back with the others",
        _CORE + "token_shards:TokenShards.joined",
        "part_MD[:size]",
        "part_MD",
        Catch(SHARES, "test_chunks_hold_every_row_once_and_padding_has_no_gradient", (2, 2, (1, 7))),
    ),
    Mutation(
        "attention sees rows of zeros",
        _CORE + "token_shards:TokenShards.whole",
        "min(self._sizes) < width",
        "False",
        Catch(SHARES, "test_shares_make_the_whole_and_the_whole_makes_the_shares", (2, 1, (1, 7))),
    ),
    Mutation(
        "the gradient of a stream that all ranks hold is summed over them",
        _CORE + "token_shards:_Leave.backward",
        "ctx.shards.mine(gradient_BSD)",
        "2.0 * ctx.shards.mine(gradient_BSD)",
        sequence_point(case="llama"),
    ),
    Mutation(
        "the embedding's gradient has the tokens of one rank only",
        _CORE + "token_shards:_Enter.backward",
        "ctx.shards.gathered(gradient_1ND)",
        "ctx.shards.gathered(gradient_1ND * (ctx.shards._rank == 0))",
        sequence_point(case="llama"),
    ),
    Mutation(
        "chunks of one sub-block are cut from the time of all",
        _CORE + "simulator:simulate",
        "max(parts[step.key.layer, step.key.stage], 1)",
        "max(parts.values())",
        Catch(EARLIEST, "test_a_stage_in_chunks_takes_as_long_as_in_one_piece"),
    ),
    # balance, links, simulator
    Mutation(
        "recomputation is counted",
        _CORE + "balance:RouterBalance.__call__",
        "if not recomputing:\n        self._counts",
        "if True:\n        self._counts",
        Catch(BALANCE, "test_a_recomputation_counts_nothing_again"),
    ),
    Mutation(
        "the host waits for how often experts were chosen",
        _CORE + "balance:RouterBalance.__call__",
        "_counts(routing.experts_TK, self._num_experts)",
        "torch.bincount(routing.experts_TK.reshape(-1), minlength=self._num_experts)",
        Catch(HOST_WAITS, "test_on_one_rank", ("deepseek_v3", "farskip", True)),
    ),
    Mutation(
        "the bias moves the wrong way",
        _CORE + "balance:RouterBalance.update",
        "mean_L1[row] - counts_LE[row]",
        "counts_LE[row] - mean_L1[row]",
        Catch(BALANCE, "test_the_bias_rises_where_tokens_are_missing"),
    ),
    Mutation(
        "the auxiliary loss sees one rank only",
        _CORE + "balance:RouterBalance.__call__",
        "self._launch_sum(local_E.double())",
        "Pending(local_E.double(), None)",
        Catch(BALANCE, "one_step_on_ranks", (2, "overlapped"), 2),
    ),
    Mutation(
        "the auxiliary loss does not wait for the counts of all ranks",
        _CORE + "balance:_LossPart.factor_E",
        "self.counts.wait()",
        "self.counts.unfilled",
        Catch(BALANCE, "test_the_counts_of_all_ranks_are_on_their_way_until_backward"),
    ),
    Mutation(
        "a recomputation sums the counts of all ranks again",
        _CORE + "balance:RouterBalance.__call__",
        "if not recomputing:\n        part =",
        "if True:\n        part =",
        Catch(BALANCE, "test_the_counts_of_all_ranks_are_on_their_way_until_backward"),
    ),
    Mutation(
        "the emulated wire is free",
        _PARALLEL + "emulated_link:EmulatedLink._pace",
        "time.sleep(duration_s)",
        "pass",
        Catch(EMULATED, "as_slow_as_it_claims", (), 2),
    ),
    Mutation(
        "the simulated link carries everything at once",
        _CORE + "simulator:simulate",
        "max(free[step.side], issued, link_free)",
        "max(free[step.side], issued)",
        Catch(SIMULATOR, "test_lanes_do_one_thing_at_a_time", ("attn_only",)),
    ),
    # megatron-core
    Mutation(
        "Megatron's block is not handed the second stream",
        _MODELS + "megatron_layer:_Call.run",
        "None if n_BSD is x_BSD else n_BSD",
        "None",
        MEGATRON_BITS,
    ),
    Mutation(
        "a pipeline cut drops the second stream",
        _MODELS + "megatron_layer:_Call.run",
        "torch.cat((x_BSD, n_BSD), dim=1)",
        "torch.cat((x_BSD, x_BSD), dim=1)",
        MEGATRON_CUT,
    ),
    Mutation(
        "both streams behind a pipeline cut are the first one",
        _MODELS + "megatron_layer:_Call.__init__",
        "hidden.chunk(2, dim=1)",
        "[hidden.chunk(2, dim=1)[0]] * 2",
        MEGATRON_CUT,
    ),
    Mutation(
        "a pipeline stage without experts adds gradients in an order of its own",
        _MODELS + "megatron_layer:Stage._make_executor",
        "in kind for kind in self._kinds)",
        "in self._kinds[layer.layer_number - 1] for layer in self._layers)",
        Catch(MEGATRON, "cuts", ([{}], 2, 2), 4),
    ),
    Mutation(
        "Megatron's recomputation is not a segment edge",
        _MODELS + "megatron_layer:Stage.segments",
        "if not recompute:",
        "if True:",
        MEGATRON_BITS,
    ),
    Mutation(
        "Megatron's attention recomputes the seam with its core",
        _MODELS + "megatron_blocks:MegatronSubBlocks.__init__",
        "attention.checkpoint_core_attention = False",
        "pass",
        MEGATRON_BITS,
    ),
    Mutation(
        "rows reach Megatron's experts in the order of their ranks",
        _MODELS + "megatron_blocks:MegatronSubBlocks.expert_rows",
        "permute(rows_RD, by_expert)",
        "rows_RD",
        MEGATRON_EQUATIONS,
    ),
    Mutation(
        "Megatron's weights of inputs are applied to outputs",
        _MODELS + "megatron_blocks:MegatronSubBlocks.route",
        "WeightOn.INPUT if",
        "WeightOn.OUTPUT if",
        MEGATRON_EQUATIONS,
    ),
    Mutation(
        "Megatron's choices of a token stand in any order",
        _MODELS + "megatron_blocks:MegatronSubBlocks.route",
        ".sort(dim=1).values",
        "",
        MEGATRON_ORDER,
    ),
]


# -- how a mutation is applied --


def function_of(where: str) -> FunctionType:
    """The plain function behind methods, static methods and decorators."""
    module, _, path = where.partition(":")
    target: Any = importlib.import_module(module)
    for name in path.split("."):
        target = vars(target)[name] if isinstance(target, type) else getattr(target, name)
    found = inspect.unwrap(target.__func__ if isinstance(target, staticmethod) else target)
    assert isinstance(found, FunctionType)
    return found


@contextmanager
def applied(mutation: Mutation) -> Iterator[None]:
    """The mutated code in place of the function's own, for everybody who holds a reference to it."""
    function = function_of(mutation.where)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(mutation.old) == 1, (
        f"{mutation.where} holds {mutation.old!r} {source.count(mutation.old)} times"
    )
    body = source[source.index("def ") :].replace(mutation.old, mutation.new)
    found: dict[str, Any] = {}
    exec(compile(body, f"<{mutation.what}>", "exec"), function.__globals__, found)
    own = function.__code__
    function.__code__ = found[function.__name__].__code__
    try:
        yield
    finally:
        function.__code__ = own


def load(path: str) -> ModuleType:
    """A test file as a module; once."""
    name = "mutated_" + path.replace("/", "_").removesuffix(".py")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TESTS / path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def call(catch: Catch) -> None:
    """Run the test. Arguments that are positions in a list of the test file are looked up there."""
    module, arguments = load(catch.path), list(catch.arguments)
    if catch.path in (EXECUTOR, SCHEDULE, RESIDUAL, LANES, SIDE_STREAM):
        lists = [values for values in (getattr(module, "WIRINGS", None), getattr(module, "MIXES", None)) if values]
        names = list(inspect.signature(getattr(module, catch.function)).parameters)
        for position, name in enumerate(names[: len(arguments)]):
            if name in ("wiring", "mix") and isinstance(arguments[position], int):
                arguments[position] = lists[("wiring", "mix").index(name)][arguments[position]]
    getattr(module, catch.function)(*arguments)


def color(catch: Catch, mutation: Mutation | None) -> str:
    """``green``, or what the test said; in this process."""
    try:
        if mutation is None:
            call(catch)
        else:
            with applied(mutation):
                call(catch)
    except (Exception, pytest.fail.Exception) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return "green"


def outcome(catch: Catch, mutation: Mutation | None, pool: "RankPool") -> str:
    """As `color`, on as many ranks as the test needs: the first that is red."""
    if not catch.ranks:
        return color(catch, mutation)
    from farskip.testing import RankError

    try:
        return next(
            (said for said in pool.run(color, catch.ranks, catch, mutation, timeout_s=60.0) if said != "green"), "green"
        )
    except RankError as error:
        return f"RankError: {str(error).splitlines()[0]}"


def table() -> str:
    """What breaks what, as it stands in docs/."""
    rows = [
        "# Mutations",
        "",
        "Each line is one safeguard of the core, taken away by `tests/test_mutations.py`, and the test that turns",
        "red. Written by `pytest tests/test_mutations.py --update-snapshots`.",
        "",
        "| what is broken | where | caught by |",
        "|---|---|---|",
    ]
    for mutation in MUTATIONS:
        catch = mutation.catch
        where = mutation.where.removeprefix("farskip.").replace(":", " ")
        rows.append(f"| {mutation.what} | `{where}` | `{catch.path}` `{catch.function}` |")
    return "\n".join(rows) + "\n"


@pytest.fixture(scope="module")
def caught() -> Iterator[dict[str, str]]:
    """What every mutation met; printed at the end of the file."""
    said: dict[str, str] = {}
    yield said
    width = max((len(what) for what in said), default=0)
    print("\n" + "\n".join(f"{what:<{width}}  {text[:100]}" for what, text in said.items()))


def hashable(catch: Catch) -> Any:
    return (catch.path, catch.function, repr(catch.arguments), catch.ranks)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what.replace(" ", "-"))
def test_a_mutation_turns_its_test_red(
    mutation: Mutation, rank_pool: "RankPool", caught: dict[str, str], green: dict[Any, str]
) -> None:
    key = hashable(mutation.catch)
    if key not in green:
        green[key] = outcome(mutation.catch, None, rank_pool)
    assert green[key] == "green", f"{mutation.catch} is red without the mutation: {green[key]}"
    said = outcome(mutation.catch, mutation, rank_pool)
    caught[mutation.what] = f"{mutation.catch.function}: {said}"
    assert said != "green", f"nothing noticed: {mutation.what}"
    assert "holds" not in said or "times" not in said, said


@pytest.fixture(scope="module")
def green() -> dict[Any, str]:
    """Tests that were run without a mutation."""
    return {}


def test_the_table_in_docs_is_current(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--update-snapshots"):
        TABLE.write_text(table(), encoding="utf-8")
    assert TABLE.exists() and TABLE.read_text(encoding="utf-8") == table(), (
        "run pytest tests/test_mutations.py --update-snapshots"
    )


def test_every_mutation_has_a_name_of_its_own() -> None:
    names = [mutation.what for mutation in MUTATIONS]
    assert len(set(names)) == len(names)
    for first, second in itertools.pairwise(MUTATIONS):
        assert (first.where, first.old, first.new) != (second.where, second.old, second.new)
