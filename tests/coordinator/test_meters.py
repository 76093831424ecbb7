from coordinator.meters import RateMeter


def test_rate_is_the_mean_over_the_window() -> None:
    meter = RateMeter(10)
    for second in range(20):
        meter.add(5.0, float(second))
    assert meter.per_second(19.9) == 5.0


def test_rate_falls_to_zero_when_nothing_comes() -> None:
    meter = RateMeter(10)
    meter.add(100.0, 0.5)
    assert meter.per_second(5.0) > 0
    assert meter.per_second(60.0) == 0.0


def test_young_meter_divides_by_its_age() -> None:
    meter = RateMeter(60)
    meter.add(4.0, 100.0)
    meter.add(4.0, 102.0)
    assert meter.per_second(104.0) == 2.0
