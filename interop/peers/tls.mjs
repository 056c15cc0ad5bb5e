// npm `ws` as an echo backend that speaks TLS: `tls.mjs https|http2 KEY CERTIFICATE`. `http2` takes both, as ALPN has it: WebSockets on
// streams (RFC 8441), and over HTTP/1.1. The transport is Node's, the frames are ws's. One JSON object per line on stdout, as from echo.py.
import { readFileSync } from 'node:fs';
import http2 from 'node:http2';
import https from 'node:https';
import { WebSocket, WebSocketServer } from 'ws';

const [kind, key, cert] = process.argv.slice(2);
const SUBPROTOCOL = 'tidegate.interop';
const MIB = 1024 * 1024;

const report = (fields) => console.log(JSON.stringify(fields));

const identity = { key: readFileSync(key), cert: readFileSync(cert) };
const server =
    kind === 'http2'
        ? http2.createSecureServer({ ...identity, allowHTTP1: true, settings: { enableConnectProtocol: true, maxConcurrentStreams: 100 } })
        : https.createServer(identity);

server.on('request', (request, response) => {
    response.writeHead(200, { 'content-type': 'text/html; charset=utf-8' });
    response.end('<!doctype html><meta charset=utf-8><title>interop</title><p>a page from the backend\n');
});

const http1 = new WebSocketServer({
    noServer: true,
    maxPayload: 64 * MIB,
    handleProtocols: (offered) => (offered.has(SUBPROTOCOL) ? SUBPROTOCOL : false),
});
server.on('upgrade', (request, socket, head) => {
    const url = new URL(request.url, 'https://backend');
    if (url.pathname === '/refused') {
        socket.end('HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n');
        return;
    }
    http1.handleUpgrade(request, socket, head, (websocket) => serve(websocket, url, socket, '1.1', websocket.protocol));
});

// Of HTTP/2: ws has no server for it, but its WebSocket takes any duplex stream.
server.on('connect', ({ stream, headers }) => {
    const url = new URL(headers[':path'], 'https://backend');
    if (headers[':protocol'] !== 'websocket' || url.pathname === '/refused') {
        stream.respond({ ':status': 403 }, { endStream: true });
        return;
    }
    const offered = (headers['sec-websocket-protocol'] ?? '').split(',').map((name) => name.trim());
    const chosen = offered.includes(SUBPROTOCOL) ? SUBPROTOCOL : '';
    stream.respond({ ':status': 200, ...(chosen && { 'sec-websocket-protocol': chosen }) });
    const websocket = new WebSocket(null, undefined, { autoPong: true, closeTimeout: 30_000 });
    serve(websocket, url, stream, '2', chosen);
    websocket.setSocket(stream, Buffer.alloc(0), { allowSynchronousEvents: true, maxPayload: 64 * MIB });
});

function serve(websocket, url, transport, version, subprotocol) {
    const name = url.searchParams.get('name') ?? '';
    let reset = false;
    transport.on('error', () => (reset = true));
    // A transport's error is told below; others end with a code.
    websocket.on('error', () => {});
    report({ event: 'open', name, version, subprotocol: subprotocol || null });
    websocket.on('message', (data, isBinary) => {
        const command = isBinary ? null : /^!close (\d+) (.*)$/.exec(data.toString());
        if (command) websocket.close(Number(command[1]), command[2]);
        else websocket.send(data, { binary: isBinary });
    });
    const both = [websocket, transport].map((each) => new Promise((closed) => each.on('close', (...how) => closed(how))));
    Promise.all(both).then(([[code, reason]]) => report({ event: 'close', name, code, reason: reason.toString(), reset }));
}

server.listen(0, '127.0.0.1', 4096, () => {
    const { address, port } = server.address();
    report({ event: 'listening', address: `${address}:${port}` });
});
process.on('SIGTERM', () => process.exit(0));
