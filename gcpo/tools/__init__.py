"""Commands around training: doctor, cost, report, evaluate and launch; training imports none of them."""
