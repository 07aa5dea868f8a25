#!/usr/bin/env bash
# GC2PO with the settings of gcpo_numinamath_1.5b.sh: the same arguments. Questions end with the prompt that asks for tags
# (data.episode_prompt); gc2po.intervention=lm_head is the cheap form, gc2po.* are its other options.
exec bash "$(dirname "${BASH_SOURCE[0]}")/gcpo_numinamath_1.5b.sh" --method gc2po "$@"
