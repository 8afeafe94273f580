package org.pytorch.serve.http;

import io.netty.buffer.Unpooled;
import io.netty.channel.ChannelDuplexHandler;
import io.netty.channel.ChannelHandlerContext;
import io.netty.channel.ChannelPromise;
import io.netty.handler.codec.http.DefaultFullHttpResponse;
import io.netty.handler.codec.http.FullHttpRequest;
import io.netty.handler.codec.http.FullHttpResponse;
import io.netty.handler.codec.http.HttpHeaderNames;
import io.netty.handler.codec.http.HttpHeaderValues;
import io.netty.handler.codec.http.HttpResponse;
import io.netty.handler.codec.http.HttpResponseStatus;
import io.netty.handler.codec.http.HttpVersion;
import io.netty.handler.codec.http.QueryStringDecoder;
import io.netty.handler.codec.http.multipart.HttpPostRequestDecoder.ErrorDataDecoderException;
import io.netty.handler.timeout.IdleStateEvent;
import io.netty.handler.timeout.IdleStateHandler;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.util.regex.Pattern;
import org.pytorch.serve.archive.DownloadArchiveException;
import org.pytorch.serve.archive.model.ModelException;
import org.pytorch.serve.archive.model.ModelNotFoundException;
import org.pytorch.serve.archive.model.ModelVersionNotFoundException;
import org.pytorch.serve.archive.workflow.WorkflowNotFoundException;
import org.pytorch.serve.util.NettyUtils;
import org.slf4j.Logger;
import org.slf4j.LoggerFactory;

/**
 * Where requests enter TorchServe 0.12.0. This class stands in for the one of the same name in its jar, whose holes it closes:
 *
 * <ul>
 *   <li>A form that cannot be parsed is answered with 400, not with 500 and a stack trace in the log, and its memory is
 *       given back.
 *   <li>A body under application/x-www-form-urlencoded, which is what {@code curl --data-binary} sends, is a body like any
 *       other. Netty's parser for these forms needs minutes of a frontend thread for a megabyte of fields.
 *   <li>A full queue is answered with 503 and Retry-After, in words that say what is the matter.
 *   <li>No request waits longer than {@code -Dcaption.answer.seconds}, even when every worker is dead or hangs.
 *   <li>A connection on which nothing comes, and nothing is waited for, is closed after {@code -Dcaption.idle.seconds}.
 *   <li>A client that leaves is not an error in the log.
 *   <li>A client's own X-Request-Id, if harmless, is that of the answer. TorchServe puts one of its own there.
 * </ul>
 *
 * One instance belongs to one connection.
 */
public class HttpRequestHandler extends ChannelDuplexHandler {

    private static final Logger logger = LoggerFactory.getLogger(HttpRequestHandler.class);
    private static final int ANSWER_SECONDS = Integer.getInteger("caption.answer.seconds", 120);
    private static final int IDLE_SECONDS = Integer.getInteger("caption.idle.seconds", 75);
    private static final int LOOK_SECONDS = Math.max(1, Math.min(5, Math.min(ANSWER_SECONDS, IDLE_SECONDS) / 2));

    private static final String REQUEST_ID = "X-Request-Id";
    /** As in handler/access_log.py: what can stand in a header and in a log as it is. */
    private static final Pattern CLIENT_ID = Pattern.compile("[A-Za-z0-9._:/+=@-]{1,128}");

    private final HttpRequestHandlerChain chain;
    private String clientId;
    private boolean inference;
    private long received;
    private long quietSince;

    public HttpRequestHandler(HttpRequestHandlerChain chain) {
        this.chain = chain;
    }

    @Override
    public void handlerAdded(ChannelHandlerContext ctx) {
        ctx.pipeline().addFirst("idle", new IdleStateHandler(LOOK_SECONDS, 0, 0));
    }

    @Override
    public void channelRead(ChannelHandlerContext ctx, Object message) {
        FullHttpRequest req = (FullHttpRequest) message;
        try {
            answer(ctx, req);
        } finally {
            req.release();
        }
    }

    /** TorchServe has its own ids for what it does, so that two clients may well choose the same. */
    @Override
    public void write(ChannelHandlerContext ctx, Object message, ChannelPromise promise) {
        if (clientId != null && message instanceof HttpResponse) {
            ((HttpResponse) message).headers().set(REQUEST_ID, clientId);
        }
        ctx.write(message, promise);
    }

    private void answer(ChannelHandlerContext ctx, FullHttpRequest req) {
        NettyUtils.requestReceived(ctx.channel(), req);
        String given = req.headers().get(REQUEST_ID, "");
        clientId = CLIENT_ID.matcher(given).matches() ? given : null;
        req.headers().remove(REQUEST_ID); // all of them
        if (clientId != null) {
            req.headers().set(REQUEST_ID, clientId);
        }
        received = System.nanoTime();
        inference = isInference(req.uri());
        try {
            if (!req.decoderResult().isSuccess()) {
                throw new BadRequestException("Invalid HTTP message.");
            }
            QueryStringDecoder query = new QueryStringDecoder(req.uri());
            try {
                query.parameters();
            } catch (IllegalArgumentException e) {
                throw new BadRequestException("Invalid query string.");
            }
            String type = req.headers().get(HttpHeaderNames.CONTENT_TYPE, "").trim().toLowerCase();
            if (type.startsWith("application/x-www-form-urlencoded")) {
                req.headers().set(HttpHeaderNames.CONTENT_TYPE, HttpHeaderValues.APPLICATION_OCTET_STREAM);
            }
            chain.handleRequest(ctx, req, query, query.path().split("/"));
        } catch (ResourceNotFoundException
                | ModelNotFoundException
                | ModelVersionNotFoundException
                | WorkflowNotFoundException e) {
            NettyUtils.sendError(ctx, HttpResponseStatus.NOT_FOUND, e);
        } catch (ErrorDataDecoderException e) {
            while (req.refCnt() > 1) { // the parts that the parser had found and will never give back
                req.release();
            }
            send(ctx, HttpResponseStatus.BAD_REQUEST, "InvalidRequest", "the multipart form cannot be parsed");
        } catch (BadRequestException e) {
            if (inference) {
                send(ctx, HttpResponseStatus.BAD_REQUEST, "InvalidRequest", "the request line or a header cannot be parsed");
            } else {
                NettyUtils.sendError(ctx, HttpResponseStatus.BAD_REQUEST, e);
            }
        } catch (ModelException | DownloadArchiveException e) {
            NettyUtils.sendError(ctx, HttpResponseStatus.BAD_REQUEST, e);
        } catch (ConflictStatusException e) {
            NettyUtils.sendError(ctx, HttpResponseStatus.CONFLICT, e);
        } catch (RequestTimeoutException e) {
            NettyUtils.sendError(ctx, HttpResponseStatus.REQUEST_TIMEOUT, e);
        } catch (MethodNotAllowedException e) {
            NettyUtils.sendError(ctx, HttpResponseStatus.METHOD_NOT_ALLOWED, e);
        } catch (ServiceUnavailableException e) {
            if (inference) {
                String message =
                        "no worker can take this request, most likely too many wait already: try again after the seconds in Retry-After";
                send(ctx, HttpResponseStatus.SERVICE_UNAVAILABLE, "Overloaded", message);
            } else {
                NettyUtils.sendError(ctx, HttpResponseStatus.SERVICE_UNAVAILABLE, e);
            }
        } catch (OutOfMemoryError e) {
            NettyUtils.sendError(ctx, HttpResponseStatus.INSUFFICIENT_STORAGE, e);
        } catch (IllegalArgumentException e) {
            NettyUtils.sendError(ctx, HttpResponseStatus.FORBIDDEN, e);
        } catch (Throwable e) {
            logger.error("", e);
            NettyUtils.sendError(ctx, HttpResponseStatus.INTERNAL_SERVER_ERROR, e);
        }
    }

    /** Nothing was read for LOOK_SECONDS, as while a request waits for its answer. */
    @Override
    public void userEventTriggered(ChannelHandlerContext ctx, Object event) throws Exception {
        if (!(event instanceof IdleStateEvent)) {
            super.userEventTriggered(ctx, event);
            return;
        }
        if (((IdleStateEvent) event).isFirst()) {
            quietSince = System.nanoTime();
        }
        boolean waiting = NettyUtils.getRequestId(ctx.channel()) != null;
        if (!waiting && secondsSince(quietSince) >= IDLE_SECONDS - LOOK_SECONDS) {
            ctx.close();
        } else if (waiting && inference && secondsSince(received) >= ANSWER_SECONDS) {
            String message = "no worker has answered for " + secondsSince(received) + " seconds: try again later";
            send(ctx, HttpResponseStatus.SERVICE_UNAVAILABLE, "NoAnswer", message);
        }
    }

    @Override
    public void exceptionCaught(ChannelHandlerContext ctx, Throwable cause) {
        if (!(cause instanceof IOException)) {
            logger.error("", cause);
        }
        if (cause instanceof OutOfMemoryError) {
            NettyUtils.sendError(ctx, HttpResponseStatus.INSUFFICIENT_STORAGE, cause);
        }
        ctx.close();
    }

    private static long secondsSince(long moment) {
        return (System.nanoTime() - moment) / 1_000_000_000L;
    }

    private static boolean isInference(String uri) {
        return uri.startsWith("/predictions")
                || uri.startsWith("/invocations")
                || uri.startsWith("/v1/")
                || uri.startsWith("/v2/")
                || uri.matches("/models/[^?]*/invoke\\b.*");
    }

    /** An error as the caption handler words it: docs/api.md. */
    private static void send(ChannelHandlerContext ctx, HttpResponseStatus status, String code, String message) {
        String body = "{\"error\":{\"code\":\"" + code + "\",\"message\":\"" + message + "\"}}";
        FullHttpResponse response =
                new DefaultFullHttpResponse(
                        HttpVersion.HTTP_1_1, status, Unpooled.wrappedBuffer(body.getBytes(StandardCharsets.UTF_8)));
        response.headers().set(HttpHeaderNames.CONTENT_TYPE, "application/json; charset=utf-8");
        if (status.equals(HttpResponseStatus.SERVICE_UNAVAILABLE)) {
            response.headers().set(HttpHeaderNames.RETRY_AFTER, "1");
        }
        NettyUtils.sendHttpResponse(ctx, response, true);
    }
}
