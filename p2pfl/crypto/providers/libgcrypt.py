"""The ciphers of libgcrypt, through ctypes, where the system has it (nearly every Linux).

Its counter modes are faster than OpenSSL's for SM4, and for long AES streams. ctypes releases the interpreter lock in
every call. Nothing is linked: the library is loaded at run time by its name, and its LGPL stays its own.
"""

import ctypes
from collections.abc import Callable
from functools import cache

import numpy as np

from p2pfl.core.errors import BadTag
from p2pfl.crypto.providers import (
    TAG_BYTES,
    Aead,
    Buffer,
    Cipher,
    Keystream,
    bytes_of,
    first_counter,
    verify_open,
    verify_seal,
)

# The names that Linux, macOS's Homebrew (Arm, Intel) and MacPorts give the one binary interface since libgcrypt 1.6.
_LIBRARY_NAMES = (
    "libgcrypt.so.20",
    "/opt/homebrew/lib/libgcrypt.20.dylib",
    "/usr/local/lib/libgcrypt.20.dylib",
    "/opt/local/lib/libgcrypt.20.dylib",
)
# gcrypt.h of libgcrypt 1.10.
_ALGORITHMS = {Cipher.AES_256: 9, Cipher.SM4: 318}
_CTR, _GCM = 6, 9
_DISABLE_SECMEM, _INITIALIZATION_FINISHED, _INITIALIZATION_FINISHED_P = 37, 38, 39
_CHECKSUM = 10  # GPG_ERR_CHECKSUM of gpg-error.h; an error's source is in the bits above the lower 16
_HANDLE, _BYTES, _LENGTH = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
_SIGNATURES = {
    "gcry_cipher_open": (ctypes.POINTER(_HANDLE), ctypes.c_int, ctypes.c_int, ctypes.c_uint),
    "gcry_cipher_setkey": (_HANDLE, _BYTES, _LENGTH),
    "gcry_cipher_setiv": (_HANDLE, _BYTES, _LENGTH),
    "gcry_cipher_setctr": (_HANDLE, _BYTES, _LENGTH),
    "gcry_cipher_authenticate": (_HANDLE, _BYTES, _LENGTH),
    "gcry_cipher_gettag": (_HANDLE, _BYTES, _LENGTH),
    "gcry_cipher_checktag": (_HANDLE, _BYTES, _LENGTH),
    "gcry_cipher_encrypt": (_HANDLE, _BYTES, _LENGTH, _BYTES, _LENGTH),
    "gcry_cipher_decrypt": (_HANDLE, _BYTES, _LENGTH, _BYTES, _LENGTH),
}
# One call's worth of zeros to encrypt, read by all streams: the 256 KiB chunks of a masked sum go in one call.
_ZEROS = bytes(1 << 18)


class Libgcrypt:
    """libgcrypt as a provider; `load` finds it."""

    name = "libgcrypt"

    def __init__(self, library: ctypes.CDLL, version: str) -> None:
        self._library = library
        self._version = version

    @property
    def version(self) -> str:
        """The version, as the library says it."""
        return self._version

    def aead(self, cipher: Cipher, key: bytes) -> Aead:
        """Return the cipher in Galois/counter mode under `key`; see `Provider.aead`."""
        return _Gcm(_Context(self._library, cipher, _GCM, key))

    def keystream(self, cipher: Cipher, key: bytes) -> Keystream:
        """Return the cipher's stream under `key`; see `Provider.keystream`."""
        return _Counter(_Context(self._library, cipher, _CTR, key))


@cache
def load() -> Libgcrypt | None:
    """Return libgcrypt, ready for use, or None where it is not found."""
    for name in _LIBRARY_NAMES:
        try:
            library = ctypes.CDLL(name)
            _declare(library)
        except (OSError, AttributeError):  # not there, or a function we call is not in it
            continue
        return Libgcrypt(library, _initialize(library))
    return None


def _declare(library: ctypes.CDLL) -> None:
    library.gcry_check_version.argtypes = (ctypes.c_char_p,)
    library.gcry_check_version.restype = ctypes.c_char_p
    library.gcry_control.restype = ctypes.c_uint
    library.gcry_cipher_close.argtypes = (_HANDLE,)
    library.gcry_cipher_close.restype = None
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_uint


def _initialize(library: ctypes.CDLL) -> str:
    """Make the library ready as its manual asks ("Initializing the library"), unless it is; return its version.

    Its locked memory is for long-lived keys of a process that runs as root; ours live in Python's memory anyway.
    """
    version: bytes = library.gcry_check_version(None)
    if not library.gcry_control(_INITIALIZATION_FINISHED_P):
        library.gcry_control(_DISABLE_SECMEM, 0)
        library.gcry_control(_INITIALIZATION_FINISHED, 0)
    return version.decode()


class _Context:
    """One cipher handle; closing it wipes the key."""

    def __init__(self, library: ctypes.CDLL, cipher: Cipher, mode: int, key: bytes) -> None:
        cipher.verify_key(key)
        self.library = library
        self.handle = _HANDLE()
        if library.gcry_cipher_open(ctypes.byref(self.handle), _ALGORITHMS[cipher], mode, 0):
            raise LookupError(f"this libgcrypt has no {cipher}")
        # Kept here, since at the interpreter's end the library's attributes may be gone.
        self._close: Callable[[ctypes.c_void_p], None] = library.gcry_cipher_close
        _verify(library.gcry_cipher_setkey(self.handle, key, len(key)))

    def __del__(self) -> None:
        close = getattr(self, "_close", None)
        if close is not None:
            close(self.handle)


class _Gcm:
    """A cipher in Galois/counter mode."""

    def __init__(self, context: _Context) -> None:
        self._context = context

    def seal_into(self, nonce: bytes, plaintext: Buffer, associated: bytes, out: memoryview) -> None:
        plain, target = bytes_of(plaintext), bytes_of(out)
        verify_seal(nonce, plain, target)
        library, handle, length = self._context.library, self._context.handle, len(plain)
        self._start(nonce, associated)
        if length:
            _verify(library.gcry_cipher_encrypt(handle, _writable(target), length, _readable(plaintext), length))
        _verify(library.gcry_cipher_gettag(handle, _writable(target[length:]), TAG_BYTES))

    def open_into(self, nonce: bytes, ciphertext: Buffer, associated: bytes, out: memoryview) -> None:
        sealed, target = bytes_of(ciphertext), bytes_of(out)
        verify_open(nonce, sealed, target)
        library, handle, length = self._context.library, self._context.handle, len(target)
        self._start(nonce, associated)
        if length:
            _verify(library.gcry_cipher_decrypt(handle, _writable(target), length, _readable(ciphertext), length))
        code = library.gcry_cipher_checktag(handle, bytes(sealed[length:]), TAG_BYTES)
        if code:
            target[:] = bytes(length)
        if code & 0xFFFF == _CHECKSUM:
            raise BadTag("a sealed message that does not open")
        _verify(code)

    def _start(self, nonce: bytes, associated: bytes) -> None:
        library, handle = self._context.library, self._context.handle
        _verify(library.gcry_cipher_setiv(handle, nonce, len(nonce)))
        _verify(library.gcry_cipher_authenticate(handle, associated, len(associated)))


class _Counter:
    """A stream: zeros encrypted in counter mode. The counter stays while reads follow each other."""

    def __init__(self, context: _Context) -> None:
        self._context = context
        self._next = -1

    def expand_into(self, offset: int, out: memoryview) -> None:
        target = bytes_of(out)
        library, handle = self._context.library, self._context.handle
        counter = first_counter(offset)
        if offset != self._next:
            _verify(library.gcry_cipher_setctr(handle, counter, len(counter)))
        self._next = -1  # should this read fail, the next one seeks
        for start in range(0, len(target), len(_ZEROS)):
            piece = target[start : start + len(_ZEROS)]
            _verify(library.gcry_cipher_encrypt(handle, _writable(piece), len(piece), _ZEROS, len(piece)))
        # After a read that ends inside a block no read can start here, so the next one seeks.
        self._next = offset + len(target)


def _verify(code: int) -> None:
    """Check what a call returned.

    Raises:
        RuntimeError: it failed, as no call does whose lengths were checked.
    """
    if code:
        raise RuntimeError(f"libgcrypt failed with error {code & 0xFFFF}")


def _writable(view: memoryview) -> object:
    """Return the address of a view's bytes, of which there is at least one, as an argument that keeps them alive."""
    return ctypes.byref(ctypes.c_char.from_buffer(view))


def _readable(buffer: Buffer) -> object:
    """Return the address of a buffer's bytes, which the caller keeps alive; ctypes would ask for a writable one."""
    return buffer if isinstance(buffer, bytes) else np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
