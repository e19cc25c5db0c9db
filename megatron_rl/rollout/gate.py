"""`UpdateGate`: an engine's answer to "may I generate, and with which version?".

    empty --begin--> updating --commit(v)--> ready(v) --begin--> updating ...
                        |--abort(intact=True)--> as before `begin`
                        |--abort(intact=False)--> updating, until a whole update is committed

A half-written engine is in `updating` and refuses to generate until a complete update is committed.
"""

from __future__ import annotations


class UpdateGate:
    """The state of one engine's weights."""

    def __init__(self) -> None:
        self._version: int | None = None
        self._updating = False
        self._whole = True  # the weights of the version committed last are all there

    @property
    def version(self) -> int:
        """Version committed last.

        Raises:
            RuntimeError: there is none.
        """
        if self._version is None:
            raise RuntimeError("the rollout engine holds no weights: push or load a version before using it")
        return self._version

    def begin(self) -> None:
        self._whole = self._whole and not self._updating
        self._updating = True

    def abort(self, intact: bool) -> None:
        """The update under way, if any, is given up; ``intact``: since `begin` nothing was written."""
        if not self._updating:
            return
        self._whole = self._whole and intact
        self._updating = not self._whole

    def commit(self, version: int) -> None:
        if not self._updating:
            raise RuntimeError(
                f"commit_update({version}) without begin_update: call begin_update before writing weights"
            )
        self._version, self._updating, self._whole = version, False, True

    def empty(self) -> None:
        """The weights are gone."""
        self._version, self._updating, self._whole = None, False, True

    def require_ready(self) -> int:
        """The version to generate with.

        Raises:
            RuntimeError: there is none, or an update is under way.
        """
        if self._updating:
            raise RuntimeError(
                "the rollout engine is in the middle of a weight update (begun, not committed), so its weights may mix "
                "two versions: finish the update with commit_update, or push again"
            )
        return self.version
