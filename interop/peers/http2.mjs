// Node's own http2 as a backend: extended CONNECT by hand, and frames as well, which are sent back as they came but for their
// masks. A Close is answered, and then the stream ended.
import http2 from 'node:http2';

const server = http2.createServer({ settings: { enableConnectProtocol: true, maxConcurrentStreams: 100 } });

server.on('stream', (stream, headers) => {
    stream.on('error', () => {});
    if (headers[':method'] !== 'CONNECT' || headers[':protocol'] !== 'websocket') {
        stream.respond({ ':status': 404 }, { endStream: true });
        return;
    }
    if (headers[':path'] === '/refused') {
        stream.respond({ ':status': 403 });
        stream.end('refused by the backend\n');
        return;
    }
    const offered = (headers['sec-websocket-protocol'] ?? '').split(',').map((name) => name.trim());
    const chosen = offered.includes('tidegate.interop') ? { 'sec-websocket-protocol': 'tidegate.interop' } : {};
    stream.respond({ ':status': 200, ...chosen });
    let waiting = Buffer.alloc(0);
    stream.on('data', (chunk) => {
        waiting = Buffer.concat([waiting, chunk]);
        for (;;) {
            const frame = parse(waiting);
            if (!frame) return;
            waiting = waiting.subarray(frame.length);
            const opcode = frame.first & 15;
            if (opcode === 10) continue;
            stream.write(encode(opcode === 9 ? 0x8a : frame.first, frame.payload));
            if (opcode === 8) stream.end();
        }
    });
    stream.on('end', () => stream.end());
});

function parse(bytes) {
    if (bytes.length < 2) return null;
    let [at, size] = [2, bytes[1] & 127];
    if (size === 126) {
        if (bytes.length < 4) return null;
        [at, size] = [4, bytes.readUInt16BE(2)];
    } else if (size === 127) {
        if (bytes.length < 10) return null;
        [at, size] = [10, Number(bytes.readBigUInt64BE(2))];
    }
    if (bytes.length < at + 4 + size) return null;
    const mask = bytes.subarray(at, at + 4);
    const payload = Buffer.from(bytes.subarray(at + 4, at + 4 + size));
    for (let index = 0; index < size; index++) payload[index] ^= mask[index & 3];
    return { first: bytes[0], payload, length: at + 4 + size };
}

function encode(first, payload) {
    const size = payload.length;
    if (size < 126) return Buffer.concat([Buffer.from([first, size]), payload]);
    const head = Buffer.alloc(size < 65536 ? 4 : 10);
    head[0] = first;
    if (size < 65536) {
        head[1] = 126;
        head.writeUInt16BE(size, 2);
    } else {
        head[1] = 127;
        head.writeBigUInt64BE(BigInt(size), 2);
    }
    return Buffer.concat([head, payload]);
}

server.listen(0, '127.0.0.1', () => {
    const { address, port } = server.address();
    console.log(JSON.stringify({ event: 'listening', address: `${address}:${port}` }));
});
process.on('SIGTERM', () => process.exit(0));
