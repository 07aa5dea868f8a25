"""Commands around training: doctor, cost, report, evaluate and launch; training does not import them."""
