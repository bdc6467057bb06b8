"""How a device gets into the cloud, and how it knows that it is the right one: token and TLS."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from datamix.errors import ConfigError
from datamix.tokens import authorization, check_token


@dataclass(frozen=True, slots=True)
class Access:
    """What a connection to the cloud needs beyond the URL; the token never shows in a repr.

    Attributes:
        token: bearer token; None where the cloud wants none.
        ca_file: PEM file of the authorities that may vouch for an ``https`` cloud; None for those
            that this machine trusts.
    """

    token: str | None = field(default=None, repr=False)
    ca_file: str | None = None

    def __post_init__(self) -> None:
        """Check the token.

        Raises:
            ConfigError: it is none; see :func:`datamix.tokens.check_token`.
        """
        if self.token is not None:
            check_token(self.token)

    @property
    def headers(self) -> dict[str, str]:
        """What each HTTP request and each handshake says about who asks."""
        return {} if self.token is None else {"Authorization": authorization(self.token)}

    def context(self, url: str) -> ssl.SSLContext | None:
        """TLS as ``url`` needs it: 1.2 or newer, certificate and host name checked; None for http.

        Raises:
            ConfigError: the file of authorities cannot be used, or the URL does without TLS.
        """
        if urlsplit(url).scheme != "https":
            if self.ca_file is not None:
                raise ConfigError(f"ca_file is given, but url is {url!r}, expected https://...")
            return None
        try:
            return ssl.create_default_context(cafile=self.ca_file)
        except OSError as error:  # ssl's own errors are among them
            raise ConfigError(
                f"ca_file {self.ca_file} cannot be used ({error.strerror or error}), expected "
                "certificates in PEM"
            ) from None


def distrust(error: BaseException) -> ConfigError | None:
    """The error of a cloud whose certificate was refused, if that is what is behind ``error``.

    To try again would not help, and would be wrong where somebody else pretends to be the cloud.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return ConfigError(
                f"the cloud's certificate is not trusted ({cause.verify_message}), expected one "
                "that ca_file or this machine's authorities vouch for"
            )
        cause = cause.__cause__ or cause.__context__
    return None
