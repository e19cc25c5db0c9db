"""Rollouts on real SGLang servers, started here or attached to, over HTTP only; SGLang itself is never imported."""
