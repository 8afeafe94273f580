package org.pytorch.serve.wlm;

import java.lang.reflect.Field;
import java.net.HttpURLConnection;
import java.util.Collections;
import java.util.Map;
import java.util.WeakHashMap;
import java.util.concurrent.BlockingDeque;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;
import org.pytorch.serve.job.Job;
import org.pytorch.serve.util.messages.BaseModelRequest;
import org.pytorch.serve.util.messages.ModelInferenceRequest;
import org.pytorch.serve.util.messages.ModelLoadModelRequest;
import org.pytorch.serve.util.messages.ModelWorkerResponse;
import org.pytorch.serve.util.messages.Predictions;
import org.pytorch.serve.util.messages.RequestInput;
import org.pytorch.serve.util.messages.WorkerCommands;
import org.slf4j.Logger;
import org.slf4j.LoggerFactory;

/**
 * The batch that a worker has in hand in TorchServe 0.12.0. This class stands in for the one of the same name in its jar.
 *
 * <p>When a worker is taken away, the thread of the management API gives its batch to the other workers while the worker's
 * own thread answers it, and nothing keeps the two apart. So a change of the workers could fail with a NullPointerException
 * halfway and leave processes behind, requests were answered with 500, twice on the same connection, or never.
 *
 * <p>Here whoever answers a request or passes it on takes it out of {@code jobs} first, which only one can; and once the
 * worker is to go, whichever thread comes first passes its batch on.
 *
 * <p>TorchServe also makes a lone request wait for the whole {@code maxBatchDelay}, and gives one worker several requests
 * while others have nothing to do. Here a worker takes one request while others are idle, and whatever there is when they
 * are not; it waits for more only where its last batch had more than one.
 */
public class BatchAggregator {

    private static final Logger logger = LoggerFactory.getLogger(BatchAggregator.class);
    private static final Map<Model, AtomicInteger> IDLE = Collections.synchronizedMap(new WeakHashMap<>());

    protected Model model;
    protected Map<String, Job> jobs;
    private volatile boolean closing;
    private boolean crowded; // was the last batch one of several requests?
    private AtomicInteger idle; // workers of the model that wait for a request
    private Map<String, BlockingDeque<Job>> queues; // the model's: that of its requests, and each worker's commands

    public BatchAggregator() {}

    public BatchAggregator(Model model) {
        this.model = model;
        this.jobs = new ConcurrentHashMap<>();
        this.idle = IDLE.computeIfAbsent(model, key -> new AtomicInteger());
        this.queues = queuesOf(model);
    }

    /** Waits for a batch, or for the command to load the model. */
    public BaseModelRequest getRequest(String threadName, WorkerState state) throws InterruptedException, ExecutionException {
        cleanJobs();
        ModelInferenceRequest request = new ModelInferenceRequest(model.getModelName());
        try {
            pollBatch(threadName, state);
        } catch (InterruptedException e) {
            failOrPassOn(true, HttpURLConnection.HTTP_INTERNAL_ERROR, "Worker died."); // what was taken before it was told to go
            throw e;
        }
        if (model.isUseJobTicket() && jobs.isEmpty()) {
            model.decNumJobTickets();
            return request;
        }
        for (Job job : jobs.values()) {
            if (job.isControlCmd()) {
                if (jobs.size() > 1) {
                    throw new IllegalStateException("A control command shares its batch.");
                }
                String gpu = job.getPayload().getStringParameter("gpu");
                return new ModelLoadModelRequest(model, gpu == null ? -1 : Integer.parseInt(gpu));
            }
            request.setCommand(job.getCmd());
            job.setScheduled();
            request.addRequest(job.getPayload());
        }
        return request;
    }

    /** Answers the batch. Is it done (true), or does a stream go on (false)? */
    public boolean sendResponse(ModelWorkerResponse message) {
        if (jobs.isEmpty()) {
            return true; // the model is loaded, or the batch has been passed on
        }
        if (message.getCode() != HttpURLConnection.HTTP_OK) {
            failOrPassOn(false, message.getCode(), message.getMessage());
            return true;
        }
        boolean done = true;
        for (Predictions answer : message.getPredictions()) {
            boolean goesOn = "true".equals(answer.getHeaders().get(RequestInput.TS_STREAM_NEXT));
            done &= !goesOn;
            Job job = goesOn ? jobs.get(answer.getRequestId()) : jobs.remove(answer.getRequestId());
            if (job == null) {
                if (closing) {
                    continue; // another worker will answer it
                }
                throw new IllegalStateException("An answer to no request: " + answer.getRequestId());
            }
            if (job.getPayload().getClientExpireTS() > System.currentTimeMillis()) {
                job.response(
                        answer.getResp(),
                        answer.getContentType(),
                        answer.getStatusCode(),
                        answer.getReasonPhrase(),
                        answer.getHeaders());
            } else {
                logger.warn("An answer comes after its client's timeout: {}", answer.getRequestId());
            }
        }
        if (done) {
            cleanJobs();
        }
        return done;
    }

    /** The worker has died, or (without a message) is taken away. */
    public void sendError(BaseModelRequest message, String error, int status) {
        if (message instanceof ModelLoadModelRequest) {
            logger.warn("Load model failed: {}, error: {}", message.getModelName(), error);
            return;
        }
        failOrPassOn(message == null, status, error);
    }

    private void failOrPassOn(boolean passOn, int status, String error) {
        for (String id : jobs.keySet()) {
            Job job = jobs.remove(id);
            if (job == null) {
                continue; // the other thread has it
            }
            if (job.isControlCmd() || !(passOn || closing)) {
                job.sendError(status, error);
            } else if (model.getMaxWorkers() > 0) {
                handleErrorJob(job);
            } else { // nobody to pass it on to
                job.sendError(HttpURLConnection.HTTP_UNAVAILABLE, error);
            }
        }
    }

    public void cleanJobs() {
        if (jobs != null) {
            jobs.clear();
        }
    }

    public void handleErrorJob(Job job) {
        model.addFirst(job);
    }

    public void pollBatch(String threadName, WorkerState state) throws InterruptedException, ExecutionException {
        boolean loaded = state == WorkerState.WORKER_MODEL_LOADED;
        BlockingDeque<Job> commands = queues.get(threadName);
        boolean commanded = commands != null && !commands.isEmpty();
        if (loaded && !commanded && !model.isUseJobTicket()) {
            pollRequests(queues.get(Model.DEFAULT_DATA_QUEUE));
        } else {
            model.pollBatch(threadName, loaded ? 0 : Long.MAX_VALUE, jobs);
        }
    }

    private void pollRequests(BlockingDeque<Job> waiting) throws InterruptedException {
        int othersIdle;
        idle.incrementAndGet();
        try {
            addJob(waiting.take());
        } finally {
            othersIdle = idle.decrementAndGet();
        }
        long end = System.nanoTime() + TimeUnit.MILLISECONDS.toNanos(crowded ? model.getMaxBatchDelay() : 0);
        int size = othersIdle == 0 && !isDescription() ? model.getBatchSize() : 1;
        while (jobs.size() < size) {
            Job job = waiting.poll(end - System.nanoTime(), TimeUnit.NANOSECONDS);
            if (job == null) {
                break;
            }
            if (job.getCmd() == WorkerCommands.DESCRIBE) { // shares no batch
                waiting.addFirst(job);
                break;
            }
            if (job.getPayload().getClientExpireTS() > System.currentTimeMillis()) {
                addJob(job);
            } else {
                logger.warn("Drop inference request {} due to client timeout", job.getPayload().getRequestId());
            }
        }
        crowded = jobs.size() > 1;
    }

    private void addJob(Job job) {
        jobs.put(job.getJobId(), job);
    }

    private boolean isDescription() {
        return jobs.values().iterator().next().getCmd() == WorkerCommands.DESCRIBE;
    }

    /** Which the model keeps to itself. */
    @SuppressWarnings("unchecked")
    private static Map<String, BlockingDeque<Job>> queuesOf(Model model) {
        try {
            Field field = Model.class.getDeclaredField("jobsDb");
            field.setAccessible(true);
            return (Map<String, BlockingDeque<Job>>) field.get(model);
        } catch (ReflectiveOperationException e) {
            throw new IllegalStateException("Not the Model of TorchServe 0.12.0", e);
        }
    }

    /** The worker will be taken away. */
    public void shutdown() {
        closing = true;
    }

    public void startEventDispatcher() {}
}
