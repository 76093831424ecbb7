import datetime

import grpc
import pytest
from cryptography import x509
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from cluster.errors import InvalidRequestError
from cluster.wire.channels import bind, new_server, open_channel
from cluster.wire.tls import VALIDITY, CertificateAuthority, Credentials, SigningRequest


def credentials(authority: CertificateAuthority, *addresses: str) -> Credentials:
    request = SigningRequest.create("node-a", addresses=addresses or ("127.0.0.1",))
    return request.credentials(authority.sign(request.pem), authority.certificate)


async def is_served(server_credentials: Credentials, channel_credentials: Credentials | None) -> bool:
    """Tell whether a health check comes through between two processes with these credentials."""
    server = new_server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = bind(server, "127.0.0.1", range(0), server_credentials)
    await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}", channel_credentials) as channel:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        return True
    except grpc.aio.AioRpcError as error:
        return error.code() != grpc.StatusCode.UNAVAILABLE
    finally:
        await server.stop(None)


@pytest.fixture(scope="module")
def authority():
    return CertificateAuthority.create()


async def test_two_processes_of_one_cluster_reach_each_other(authority):
    assert await is_served(credentials(authority), credentials(authority))


async def test_a_plaintext_caller_is_refused(authority):
    assert not await is_served(credentials(authority), None)


async def test_a_caller_of_another_cluster_is_refused(authority):
    other = CertificateAuthority.create()
    theirs = credentials(other)
    trusting = Credentials(theirs.key, theirs.certificate, authority.certificate)
    assert not await is_served(credentials(authority), trusting)


async def test_a_caller_without_a_certificate_is_refused(authority):
    server = new_server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = bind(server, "127.0.0.1", range(0), credentials(authority))
    await server.start()
    anonymous = grpc.ssl_channel_credentials(authority.certificate)
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", anonymous) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    await server.stop(None)


async def test_a_server_of_another_cluster_is_refused(authority):
    ours = credentials(authority)
    theirs = credentials(CertificateAuthority.create())
    naive = Credentials(theirs.key, theirs.certificate, authority.certificate)
    assert not await is_served(naive, ours)


async def test_a_server_under_another_address_is_refused(authority):
    assert not await is_served(credentials(authority, "10.1.2.3"), credentials(authority))


def test_a_certificate_names_its_addresses_and_expires_soon(authority):
    now = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
    request = SigningRequest.create("node-a", addresses=("10.1.2.3", "fd00::1", "a.example"))
    certificate = x509.load_pem_x509_certificate(authority.sign(request.pem, now))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["node-a", "a.example"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.1.2.3", "fd00::1"]
    assert certificate.not_valid_after_utc == now + VALIDITY
    assert certificate.not_valid_before_utc < now


def test_the_private_key_does_not_travel_with_the_request():
    assert b"PRIVATE" not in SigningRequest.create("node-a", addresses=()).pem


def test_credentials_do_not_print_their_key(authority):
    assert "PRIVATE" not in repr(credentials(authority))


def test_what_is_not_a_signing_request_is_refused(authority):
    with pytest.raises(InvalidRequestError, match="signing request"):
        authority.sign(b"hello")


def test_an_authority_cannot_be_made_by_asking_for_a_certificate(authority):
    request = SigningRequest.create("node-a", addresses=())
    certificate = x509.load_pem_x509_certificate(authority.sign(request.pem))
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
