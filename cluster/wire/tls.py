"""Mutual TLS within one run of the cluster, from keys that exist in memory only.

The authority lives in `cluster serve`. Every process makes its own key and lets only a signing request travel. Not for
the client-facing port.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cluster.errors import InvalidRequestError

VALIDITY = datetime.timedelta(days=30)
CLOCK_SKEW = datetime.timedelta(hours=24)
"""Certificates are valid from this long ago, since the clocks of the nodes may differ."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """A process's key and certificate, and the authority whose certificates it trusts. All PEM."""

    key: bytes = field(repr=False)
    certificate: bytes
    authority: bytes

    def server(self) -> grpc.ServerCredentials:
        """Return server credentials that refuse a client without a certificate of the authority."""
        pairs = ((self.key, self.certificate),)
        return grpc.ssl_server_credentials(pairs, root_certificates=self.authority, require_client_auth=True)

    def channel(self) -> grpc.ChannelCredentials:
        """Return channel credentials that show the certificate and trust the authority only."""
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)


class SigningRequest:
    """A private key that never leaves its process, and the request to certify it."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, pem: bytes) -> None:
        self._key = key
        self.pem = pem

    @classmethod
    def create(cls, name: str, *, addresses: Sequence[str]) -> SigningRequest:
        """Make a key, to be known as the DNS name `name` and under `addresses` (IP addresses or DNS names)."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = x509.CertificateSigningRequestBuilder().subject_name(_subject(name))
        alternatives = x509.SubjectAlternativeName(_alternative_names((name, *addresses)))
        request = builder.add_extension(alternatives, critical=False).sign(key, hashes.SHA256())
        return cls(key, request.public_bytes(serialization.Encoding.PEM))

    def credentials(self, certificate: bytes, authority: bytes) -> Credentials:
        """Return what to serve and dial with once the authority has signed."""
        return Credentials(_key_pem(self._key), certificate, authority)


class CertificateAuthority:
    """Signs the certificates of one run. Its key is never written anywhere."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self._certificate = certificate
        self.certificate = certificate.public_bytes(serialization.Encoding.PEM)

    @classmethod
    def create(cls, now: datetime.datetime | None = None) -> CertificateAuthority:
        """Make an authority, valid from now (the system's clock unless given)."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _subject("spanwise cluster")
        builder = _builder(subject, subject, key.public_key(), now)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        return cls(key, builder.sign(key, hashes.SHA256()))

    def sign(self, request_pem: bytes, now: datetime.datetime | None = None) -> bytes:
        """Return the PEM certificate for a signing request. Raises InvalidRequestError for a malformed one."""
        try:
            request = x509.load_pem_x509_csr(request_pem)
            alternatives = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (ValueError, x509.ExtensionNotFound) as error:
            raise InvalidRequestError(f"not a signing request: {error}") from error
        if not request.is_signature_valid:
            raise InvalidRequestError("the signing request is not signed by its own key")
        public_key = request.public_key()
        if not isinstance(public_key, ec.EllipticCurvePublicKey):
            raise InvalidRequestError("the signing request's key is not an elliptic curve key")
        builder = _builder(request.subject, self._certificate.subject, public_key, now)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(alternatives, critical=False)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        certificate = builder.add_extension(issuer, critical=False).sign(self._key, hashes.SHA256())
        return certificate.public_bytes(serialization.Encoding.PEM)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime.datetime | None
) -> x509.CertificateBuilder:
    moment = now or datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(moment - CLOCK_SKEW)
        .not_valid_after(moment + VALIDITY)
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _alternative_names(names: Sequence[str]) -> list[x509.GeneralName]:
    return [_alternative_name(name) for name in dict.fromkeys(names)]


def _alternative_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
