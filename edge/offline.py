"""What the mode split asks of operator B: answers to noise, before there is an input."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from datamix import wire
from datamix.errors import AnswerError
from edge.session import check_answer

if TYPE_CHECKING:
    from datamix.bundle import Manifest
    from edge.masks import Fetch, Seeds
    from edge.requester import Requester
    from edge.session import Floats


def fetch_from(end: Requester, manifest: Manifest, timeout_s: float) -> Fetch:
    """A :data:`edge.masks.Fetch` that asks operator B at ``end``.

    Args:
        end: with the patience for one request.
        manifest: of the bundle that both operators serve.
        timeout_s: for one request with all its retries, which send the same seeds.
    """

    async def fetch(block: int, seeds: Seeds) -> Floats:
        def encode(request_id: str, left_s: float) -> bytes:
            return wire.encode_noise_request(
                seeds,
                request_id=request_id,
                model=manifest.name,
                model_version=manifest.version,
                block=block,
                deadline_s=left_s,
            )

        answer = await end.ask(encode, time.monotonic() + timeout_s)
        try:
            check_answer(answer, len(seeds), manifest.blocks[block].output_shape)
        except AnswerError as error:
            raise AnswerError(f"operator B: {error}") from None
        return answer

    return fetch
