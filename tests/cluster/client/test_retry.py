import random

from hypothesis import given
from hypothesis import strategies as st

from cluster.client import RetryPolicy


@given(num_failed=st.integers(1, 50), seed=st.integers(0, 1000))
def test_delays_grow_up_to_the_longest_and_end(num_failed, seed):
    policy = RetryPolicy(max_attempts=10, first_delay_seconds=0.1, longest_delay_seconds=2.0)
    delay = policy.delay_seconds(num_failed, random.Random(seed))
    if num_failed >= 10:
        assert delay is None
    else:
        ceiling = min(2.0, 0.1 * 2 ** (num_failed - 1))
        assert delay is not None
        assert ceiling / 2 <= delay <= ceiling


def test_one_attempt_means_no_retry():
    assert RetryPolicy(max_attempts=1).delay_seconds(1, random.Random(0)) is None
