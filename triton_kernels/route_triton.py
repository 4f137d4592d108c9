# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Routing in Triton: one kernel forward, a small one for the sums over tokens, one joint kernel backward.

Decides the layout: a program holds ROWS tokens by all experts in one warp, because K rounds of reductions over more
warps would each cost a barrier. A round takes the maximum and then the lowest position that holds it: exact ties for
fewer instructions than an arg-max, a sort or packed keys. Sums over tokens (counts, probability mass, z) are written
per program and added up afterwards in a fixed order, so there are no atomics.

Experts sit at positions: group g, member j at g * BLOCK_MEMBERS + j, both padded to powers of two, so that any number
of groups and of experts reduces over a plain axis.

Legend: T tokens, E experts, K experts per token, G groups, P positions, N programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from farskip.triton_kernels.common_triton import INTERPRETING, exp, on_device, sigmoid, to_storage
from farskip.triton_kernels.route_reference import EPS, EXCLUDED, HIGHEST, LOWEST, RouteRule

_EPS = tl.constexpr(EPS)
_HIGHEST = tl.constexpr(HIGHEST)
_LOWEST = tl.constexpr(LOWEST)
_EXCLUDED = tl.constexpr(EXCLUDED)
_NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def _positions(NUM_MEMBERS: tl.constexpr, BLOCK_MEMBERS: tl.constexpr, BLOCK: tl.constexpr):
    """Expert at each position. The plain case is told apart so that the compiler sees consecutive addresses."""
    pos = tl.arange(0, BLOCK)
    if NUM_MEMBERS == BLOCK_MEMBERS or BLOCK == BLOCK_MEMBERS:
        return pos
    return pos // BLOCK_MEMBERS * NUM_MEMBERS + pos % BLOCK_MEMBERS


@triton.jit
def _valid(NUM_MEMBERS: tl.constexpr, BLOCK_MEMBERS: tl.constexpr, NUM_GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Whether a position holds an expert."""
    pos = tl.arange(0, BLOCK)
    return (pos % BLOCK_MEMBERS < NUM_MEMBERS) & (pos // BLOCK_MEMBERS < NUM_GROUPS)


@triton.jit
def _keep_best_groups(
    key,
    ROWS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_MAX: tl.constexpr,
):
    """Exclude the positions of all but the best groups."""
    key3 = tl.reshape(key, [ROWS, BLOCK_GROUPS, BLOCK_MEMBERS])
    best = tl.max(key3, axis=2)
    if not GROUP_MAX:
        member = tl.arange(0, BLOCK_MEMBERS)[None, None, :]
        first = tl.min(tl.where(key3 == best[:, :, None], member, BLOCK_MEMBERS), axis=2)
        second = tl.max(tl.where(member == first[:, :, None], _NEG_INF, key3), axis=2)
        best = tl.minimum(tl.maximum(best + second, _LOWEST), _HIGHEST)
    group = tl.arange(0, BLOCK_GROUPS)[None, :]
    best = tl.where(group < NUM_GROUPS, best, _EXCLUDED)
    for _ in tl.static_range(TOP_GROUPS):
        top = tl.max(best, axis=1)
        index = tl.min(tl.where(best == top[:, None], group, BLOCK_GROUPS), axis=1)
        best = tl.where(group == index[:, None], _NEG_INF, best)
    kept = (best == _NEG_INF)[:, :, None]
    return tl.reshape(tl.where(kept, key3, _EXCLUDED), [ROWS, BLOCK_GROUPS * BLOCK_MEMBERS])


@triton.jit
def route_forward_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    experts_ptr,
    tile_counts_ptr,
    tile_shares_ptr,
    tile_z_ptr,
    num_tokens,
    scale,
    NUM_EXPERTS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_MAX: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_AUX: tl.constexpr,
    HAS_Z: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Score, select and weigh ROWS tokens; write their share of the counts and of the two losses."""
    BLOCK: tl.constexpr = BLOCK_GROUPS * BLOCK_MEMBERS
    NUM_MEMBERS: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
    tile = tl.program_id(0)
    token = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    live = token < num_tokens
    expert = _positions(NUM_MEMBERS, BLOCK_MEMBERS, BLOCK)
    valid = _valid(NUM_MEMBERS, BLOCK_MEMBERS, NUM_GROUPS, BLOCK)
    at = token[:, None] * NUM_EXPERTS + expert[None, :]
    logit = tl.load(logits_ptr + at, mask=live[:, None] & valid[None, :], other=0.0).to(tl.float32)
    bad = tl.max((logit < -_NEG_INF).to(tl.int32) ^ 1, axis=1) > 0  # NaN or +inf
    logit = tl.where(valid[None, :], logit, _NEG_INF)

    highest = tl.max(logit, axis=1)
    scores_enter: tl.constexpr = HAS_BIAS or NUM_GROUPS > 1
    if HAS_Z or (not SIGMOID and (scores_enter or HAS_AUX or not RENORMALIZE)):
        power = exp(logit - highest[:, None])
        power_sum = tl.sum(power, axis=1)
    if SIGMOID and (scores_enter or HAS_AUX):
        score = sigmoid(logit)
    elif scores_enter or HAS_AUX:
        score = power / power_sum[:, None]
    key = logit
    if scores_enter:
        key = score
        if HAS_BIAS:
            bias = tl.load(bias_ptr + expert, mask=valid, other=0.0).to(tl.float32)
            key = key + bias[None, :]
    key = tl.where(key == key, key, _LOWEST)
    key = tl.minimum(tl.maximum(key, _LOWEST), _HIGHEST)
    key = tl.where(valid[None, :], key, _EXCLUDED)
    if NUM_GROUPS > 1:
        key = _keep_best_groups(key, ROWS, NUM_GROUPS, BLOCK_GROUPS, BLOCK_MEMBERS, TOP_GROUPS, GROUP_MAX)

    position = tl.arange(0, BLOCK)[None, :]
    slot = tl.arange(0, BLOCK_K)[None, :]
    chosen_expert = tl.zeros([ROWS, BLOCK_K], tl.int32)
    for k in tl.static_range(K):
        best = tl.max(key, axis=1)
        index = tl.min(tl.where(key == best[:, None], position, BLOCK), axis=1)
        hit = position == index[:, None]
        key = tl.where(hit, _NEG_INF, key)
        chosen_expert = tl.where(slot == k, index[:, None], chosen_expert)
    if NUM_MEMBERS != BLOCK_MEMBERS and NUM_GROUPS > 1:
        chosen_expert = chosen_expert // BLOCK_MEMBERS * NUM_MEMBERS + chosen_expert % BLOCK_MEMBERS

    # Read again, from cache: keeping track of the chosen values would cost a third reduction in each round
    stored = live[:, None] & (slot < K)
    chosen_at = token[:, None] * NUM_EXPERTS + chosen_expert
    chosen_logit = tl.load(logits_ptr + chosen_at, mask=stored, other=0.0).to(tl.float32)
    chosen_logit = tl.where(slot < K, chosen_logit, _NEG_INF)
    if SIGMOID:
        weight = sigmoid(chosen_logit)
        if RENORMALIZE:
            weight = weight / (tl.sum(weight, axis=1) + _EPS)[:, None]
    elif RENORMALIZE:
        weight = exp(chosen_logit - tl.max(chosen_logit, axis=1)[:, None])
        weight = weight / tl.sum(weight, axis=1)[:, None]
    else:
        weight = exp(chosen_logit - highest[:, None]) / power_sum[:, None]
    weight = tl.where(bad[:, None], float("nan"), weight * scale)
    slots = token[:, None] * K + slot
    tl.store(weights_ptr + slots, weight, mask=stored)
    tl.store(experts_ptr + slots, chosen_expert.to(tl.int64), mask=stored)

    tile_at = tile.to(tl.int64) * NUM_EXPERTS + expert
    chosen = ((key == _NEG_INF) & live[:, None]).to(tl.int32)
    tl.store(tile_counts_ptr + tile_at, tl.sum(chosen, axis=0), mask=valid)
    if HAS_AUX:
        if SIGMOID:
            score = score / (tl.sum(score, axis=1) + _EPS)[:, None]
        share = tl.sum(tl.where(live[:, None], score, 0.0), axis=0)
        tl.store(tile_shares_ptr + tile_at, share, mask=valid)
    if HAS_Z:
        lse = highest + tl.log(power_sum)
        tl.store(tile_z_ptr + tile, tl.sum(tl.where(live, lse * lse, 0.0), axis=0))


@triton.jit
def route_sums_kernel(
    tile_counts_ptr,
    tile_shares_ptr,
    counts_ptr,
    products_ptr,
    num_tiles,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    HAS_AUX: tl.constexpr,
):
    """Add up the programs' counts and shares in program order; write counts, and counts times shares for aux."""
    expert = tl.program_id(0) * BLOCK_EXPERTS + tl.arange(0, BLOCK_EXPERTS)
    valid = expert < NUM_EXPERTS
    count = tl.zeros([BLOCK_EXPERTS], tl.int32)
    share = tl.zeros([BLOCK_EXPERTS], tl.float32)
    for start in range(0, num_tiles, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)
        at = tile.to(tl.int64)[:, None] * NUM_EXPERTS + expert[None, :]
        mask = (tile < num_tiles)[:, None] & valid[None, :]
        count += tl.sum(tl.load(tile_counts_ptr + at, mask=mask, other=0), axis=0)
        if HAS_AUX:
            share += tl.sum(tl.load(tile_shares_ptr + at, mask=mask, other=0.0), axis=0)
    tl.store(counts_ptr + expert, count, mask=valid)
    if HAS_AUX:
        tl.store(products_ptr + expert, count.to(tl.float32) * share, mask=valid)


@triton.jit
def route_backward_kernel(
    grad_weights_ptr,
    grad_aux_ptr,
    grad_z_ptr,
    logits_ptr,
    experts_ptr,
    counts_ptr,
    grad_logits_ptr,
    num_tokens,
    scale,
    aux_factor,
    z_factor,
    NUM_EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_AUX: tl.constexpr,
    HAS_Z: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradient of ROWS tokens' logits from weights, aux loss and z-loss together, while the row is in registers."""
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    live = token < num_tokens
    expert = tl.arange(0, BLOCK)[None, :]
    slot = tl.arange(0, BLOCK_K)[None, :]
    at = token[:, None] * NUM_EXPERTS + expert
    mask = live[:, None] & (expert < NUM_EXPERTS)
    slots = token[:, None] * K + slot
    stored = live[:, None] & (slot < K)
    grad_k = tl.load(grad_weights_ptr + slots, mask=stored, other=0.0).to(tl.float32) * scale
    expert_k = tl.load(experts_ptr + slots, mask=stored, other=0).to(tl.int32)
    logit_k = tl.load(logits_ptr + token[:, None] * NUM_EXPERTS + expert_k, mask=stored, other=0.0).to(tl.float32)
    logit_k = tl.where(slot < K, logit_k, _NEG_INF)
    if HAS_AUX or HAS_Z or not (SIGMOID or RENORMALIZE):
        logit = tl.load(logits_ptr + at, mask=mask, other=0.0).to(tl.float32)
        logit = tl.where(expert < NUM_EXPERTS, logit, _NEG_INF)
        highest = tl.max(logit, axis=1)
        prob = exp(logit - highest[:, None])
        prob_sum = tl.sum(prob, axis=1)
        prob = prob / prob_sum[:, None]

    if SIGMOID:
        score_k = sigmoid(logit_k)
        if RENORMALIZE:
            total = (tl.sum(score_k, axis=1) + _EPS)[:, None]
            grad_k = (grad_k - tl.sum(grad_k * score_k / total, axis=1)[:, None]) / total
        grad_k = grad_k * score_k * (1.0 - score_k)
    elif RENORMALIZE:
        share_k = exp(logit_k - tl.max(logit_k, axis=1)[:, None])
        share_k = share_k / tl.sum(share_k, axis=1)[:, None]
        grad_k = share_k * (grad_k - tl.sum(grad_k * share_k, axis=1)[:, None])
    grad = tl.zeros([ROWS, BLOCK], tl.float32)
    for k in tl.static_range(K):
        grad_at_k = tl.sum(tl.where(slot == k, grad_k, 0.0), axis=1)
        expert_at_k = tl.sum(tl.where(slot == k, expert_k, 0), axis=1)
        grad = tl.where(expert == expert_at_k[:, None], grad_at_k[:, None], grad)
    if not (SIGMOID or RENORMALIZE):
        grad = prob * (grad - tl.sum(grad * prob, axis=1)[:, None])
    if HAS_AUX:
        count = tl.load(counts_ptr + expert, mask=expert < NUM_EXPERTS, other=0).to(tl.float32)
        share = prob
        if SIGMOID:
            score = sigmoid(logit)
            share = score / (tl.sum(score, axis=1) + _EPS)[:, None]
        inner = share * (count - tl.sum(share * count, axis=1)[:, None])
        if SIGMOID:
            inner = inner * (1.0 - score)
        grad += tl.load(grad_aux_ptr).to(tl.float32) * aux_factor * inner
    if HAS_Z:
        lse = (highest + tl.log(prob_sum))[:, None]
        grad += tl.load(grad_z_ptr).to(tl.float32) * z_factor * lse * prob
    tl.store(grad_logits_ptr + at, to_storage(grad, grad_logits_ptr.dtype.element_ty), mask=mask)


def _rows_per_program(num_tokens: int, block: int) -> int:
    """Few rows keep a warp's registers free; the interpreter pays per program, so there it is as many as sensible."""
    if INTERPRETING:
        return min(64, triton.next_power_of_2(max(1, num_tokens)))
    return 4 if block <= 256 else 2 if block <= 512 else 1


def _warps(block: int) -> int:
    """One warp while a row takes at most 32 registers of each lane."""
    return 1 if block <= 1024 else triton.cdiv(block, 1024)


def route_triton(
    logits_TE: Tensor, bias_E: Tensor | None, rule: RouteRule
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Forward of `route_reference`, fp32 arithmetic. `logits_TE` contiguous."""
    num_tokens, num_experts = logits_TE.shape
    device = logits_TE.device
    num_members = num_experts // rule.num_groups
    block_groups = triton.next_power_of_2(rule.num_groups)
    block_members = triton.next_power_of_2(num_members)
    block = block_groups * block_members
    rows = _rows_per_program(num_tokens, block)
    num_tiles = triton.cdiv(num_tokens, rows)
    has_aux, has_z = bool(rule.aux_coeff), bool(rule.z_coeff)
    weights_TK = torch.empty(num_tokens, rule.top_k, dtype=torch.float32, device=device)
    experts_TK = torch.empty(num_tokens, rule.top_k, dtype=torch.int64, device=device)
    zero = torch.zeros((), dtype=torch.float32, device=device)
    if num_tokens == 0:
        return weights_TK, experts_TK, torch.zeros(num_experts, dtype=torch.int32, device=device), zero, zero.clone()
    tile_counts_NE = torch.empty(num_tiles, num_experts, dtype=torch.int32, device=device)
    tile_shares_NE = torch.empty(num_tiles, num_experts, device=device) if has_aux else None
    tile_z_N = torch.empty(num_tiles, device=device) if has_z else None
    counts_E = torch.empty(num_experts, dtype=torch.int32, device=device)
    products_E = torch.empty(num_experts, device=device) if has_aux else None
    with on_device(logits_TE):
        route_forward_kernel[(num_tiles,)](
            logits_TE,
            bias_E,
            weights_TK,
            experts_TK,
            tile_counts_NE,
            tile_shares_NE,
            tile_z_N,
            num_tokens,
            rule.scale,
            NUM_EXPERTS=num_experts,
            K=rule.top_k,
            BLOCK_K=triton.next_power_of_2(rule.top_k),
            NUM_GROUPS=rule.num_groups,
            BLOCK_GROUPS=block_groups,
            BLOCK_MEMBERS=block_members,
            TOP_GROUPS=rule.top_groups,
            GROUP_MAX=rule.group_score == "max",
            SIGMOID=rule.score == "sigmoid",
            RENORMALIZE=rule.renormalize,
            HAS_BIAS=bias_E is not None,
            HAS_AUX=has_aux,
            HAS_Z=has_z,
            ROWS=rows,
            num_warps=_warps(block),
        )
        route_sums_kernel[(triton.cdiv(num_experts, 32),)](
            tile_counts_NE,
            tile_shares_NE,
            counts_E,
            products_E,
            num_tiles,
            NUM_EXPERTS=num_experts,
            BLOCK_EXPERTS=32,
            BLOCK_TILES=64,
            HAS_AUX=has_aux,
            num_warps=4,
        )
    aux_loss = zero if products_E is None else products_E.sum() * _aux_factor(rule, num_tokens, num_experts)
    z_loss = zero.clone() if tile_z_N is None else tile_z_N.sum() * (rule.z_coeff / num_tokens)
    return weights_TK, experts_TK, counts_E, aux_loss, z_loss


def _aux_factor(rule: RouteRule, num_tokens: int, num_experts: int) -> float:
    return num_experts * rule.aux_coeff / (rule.top_k * num_tokens**2)


def route_backward_triton(
    grad_weights_TK: Tensor,
    grad_aux: Tensor,
    grad_z: Tensor,
    logits_TE: Tensor,
    experts_TK: Tensor,
    counts_E: Tensor,
    rule: RouteRule,
) -> Tensor:
    """Backward of `route_reference`, see `route_backward_reference`. All tensors contiguous."""
    num_tokens, num_experts = logits_TE.shape
    grad_logits_TE = torch.empty_like(logits_TE)
    if num_tokens == 0:
        return grad_logits_TE
    block = triton.next_power_of_2(num_experts)
    rows = _rows_per_program(num_tokens, block)
    with on_device(logits_TE):
        route_backward_kernel[(triton.cdiv(num_tokens, rows),)](
            grad_weights_TK,
            grad_aux,
            grad_z,
            logits_TE,
            experts_TK,
            counts_E,
            grad_logits_TE,
            num_tokens,
            rule.scale,
            _aux_factor(rule, num_tokens, num_experts),
            2 * rule.z_coeff / num_tokens,
            NUM_EXPERTS=num_experts,
            BLOCK=block,
            K=rule.top_k,
            BLOCK_K=triton.next_power_of_2(rule.top_k),
            SIGMOID=rule.score == "sigmoid",
            RENORMALIZE=rule.renormalize,
            HAS_AUX=bool(rule.aux_coeff),
            HAS_Z=bool(rule.z_coeff),
            ROWS=rows,
            num_warps=_warps(block),
        )
    return grad_logits_TE
