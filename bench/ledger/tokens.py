"""Tokens of a provider whose keys are in the config, signed as most are: RS256."""

import base64
import json
import os
import subprocess
import time

ISSUER, AUDIENCE = "https://login.example.com", "penstock"


def encoded(data):
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=")


class Issuer:
    def __init__(self, folder):
        self.key = os.path.join(folder, "key.pem")
        self._openssl("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", self.key)
        modulus = self._openssl("rsa", "-in", self.key, "-noout", "-modulus").decode().strip().split("=")[1]
        # 65537.
        self.public = {"kty": "RSA", "kid": "1", "alg": "RS256", "n": encoded(bytes.fromhex(modulus)).decode(), "e": "AQAB"}

    def _openssl(self, *words, data=None):
        return subprocess.run(["openssl", *words], input=data, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout

    def provider(self):
        """The IdentityProvider that takes its tokens."""
        jwt = {"issuer": ISSUER, "audiences": [AUDIENCE], "jwks": {"inline": json.dumps({"keys": [self.public]})}}
        item = {"apiVersion": "penstock.dev/v1alpha1", "kind": "IdentityProvider", "metadata": {"name": "login"}}
        # JSON is YAML.
        return json.dumps(item | {"spec": {"jwt": jwt, "team": {"value": "search"}}}) + "\n"

    def token(self, number):
        now = int(time.time())
        claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": f"user-{number}", "iat": now, "exp": now + 3600}
        text = encoded({"alg": "RS256", "kid": "1", "typ": "JWT"}) + b"." + encoded(claims)
        return (text + b"." + encoded(self._openssl("dgst", "-sha256", "-sign", self.key, data=text))).decode()
