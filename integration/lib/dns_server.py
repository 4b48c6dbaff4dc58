"""A name server for cases: every name that is asked for has the address 192.0.2.7;
what is asked by datagrams for a name that begins with "long" is answered as too long.

usage: dns_server.py ADDRESS
"""

import socketserver
import struct
import sys
import threading


def answer(query, may_be_long):
    """The answer to a query with one question, which is repeated (RFC 1035)."""
    end = query.index(b"\0", 12) + 5
    name = query[12:end]
    flags, records = 0x8180, 1
    if name[1:].startswith(b"long") and not may_be_long:
        flags, records = 0x8380, 0
    kind = struct.unpack(">H", name[-4:-2])[0]
    if kind != 1:
        records = 0
    record = struct.pack(">HHHIH4B", 0xC00C, 1, 1, 60, 4, 192, 0, 2, 7)
    return query[:2] + struct.pack(">HHHHH", flags, 1, records, 0, 0) + name + record * records


class Datagrams(socketserver.BaseRequestHandler):
    def handle(self):
        query, socket = self.request
        socket.sendto(answer(query, False), self.client_address)


class Connections(socketserver.StreamRequestHandler):
    def handle(self):
        while length := self.rfile.read(2):
            reply = answer(self.rfile.read(struct.unpack(">H", length)[0]), True)
            self.wfile.write(struct.pack(">H", len(reply)) + reply)


class ConnectionServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


address = (sys.argv[1], 53)
datagrams = socketserver.UDPServer(address, Datagrams)
threading.Thread(target=datagrams.serve_forever, daemon=True).start()
print("ready", flush=True)
ConnectionServer(address, Connections).serve_forever()
