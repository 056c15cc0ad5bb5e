// The npm clients `ws` and `undici`, driven by lines on stdin (lines.mjs). Usage: node node.mjs ws|undici
import WsWebSocket from 'ws';
import { WebSocket as UndiciWebSocket, ping as undiciPing } from 'undici';
import diagnostics from 'node:diagnostics_channel';
import './socket.js';
import { serve } from './lines.mjs';

const flavour = process.argv[2];
const operations = socketOperations(flavour === 'ws' ? WsWebSocket : UndiciWebSocket);

if (flavour === 'ws') {
    operations.ping = ({ name, data }) =>
        new Promise((resolve) => {
            const { websocket } = operations.sockets.get(name);
            websocket.once('pong', (payload) => resolve(payload.toString()));
            websocket.ping(data);
        });
    // The status of a refused handshake, which the browser's API hides.
    operations.status = ({ url }) =>
        new Promise((resolve, reject) => {
            const websocket = new WsWebSocket(url);
            websocket.on('open', () => reject(new Error('opened')));
            websocket.on('error', reject);
            websocket.on('unexpected-response', (_request, response) => {
                response.resume();
                resolve(response.statusCode);
            });
        });
} else {
    operations.ping = ({ name, data }) =>
        new Promise((resolve) => {
            diagnostics.subscribe('undici:websocket:pong', ({ payload }) => resolve(Buffer.from(payload).toString()));
            undiciPing(operations.sockets.get(name).websocket, Buffer.from(data));
        });
}

await serve(operations);
