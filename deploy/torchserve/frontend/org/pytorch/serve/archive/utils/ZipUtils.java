package org.pytorch.serve.archive.utils;

import java.io.BufferedInputStream;
import java.io.File;
import java.io.IOException;
import java.io.InputStream;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.util.UUID;
import java.util.zip.ZipEntry;
import java.util.zip.ZipInputStream;
import org.apache.commons.compress.archivers.tar.TarArchiveEntry;
import org.apache.commons.compress.archivers.tar.TarArchiveInputStream;
import org.apache.commons.compress.compressors.gzip.GzipCompressorInputStream;
import org.apache.commons.io.FileUtils;

/**
 * Unpacks model archives, as TorchServe 0.12.0 needs it. This class stands in for the one of the same name in its jar.
 *
 * <p>TorchServe computes the SHA-256 of the whole archive meanwhile and does nothing with it; with Java's quick compiler
 * that took far longer than the unpacking, and every start and every new model version waited for it. An archive that
 * could not be unpacked left what there was of it in the temporary directory.
 */
public final class ZipUtils {

    private ZipUtils() {}

    /** Unpacks an archive into a new directory. isMar: a zip file; otherwise tar and gzip, with one directory around all. */
    public static File unzip(InputStream stream, String eTag, String type, boolean isMar) throws IOException {
        File directory = createTempDir(eTag, type);
        try (InputStream buffered = new BufferedInputStream(stream, 1 << 16)) {
            if (isMar) {
                unzip(buffered, directory.toPath());
            } else {
                untar(buffered, directory.toPath());
            }
        } catch (IOException | RuntimeException error) {
            FileUtils.deleteQuietly(directory);
            throw error;
        }
        return directory;
    }

    /** An empty directory for a model; eTag: its name, or null for any that is free. */
    public static File createTempDir(String eTag, String type) throws IOException {
        String name = eTag == null ? UUID.randomUUID().toString().replace("-", "") : eTag;
        File directory = new File(new File(FileUtils.getTempDirectory(), type), name);
        if (directory.exists()) {
            FileUtils.forceDelete(directory);
        }
        FileUtils.forceMkdir(directory);
        return directory;
    }

    /** A link in `directory` to a model that is not packed. */
    public static File createSymbolicDir(File source, File directory) throws IOException {
        Path link = directory.toPath().resolve(source.getName());
        return Files.createSymbolicLink(link, source.toPath()).toFile();
    }

    private static void unzip(InputStream stream, Path directory) throws IOException {
        ZipInputStream archive = new ZipInputStream(stream);
        for (ZipEntry entry = archive.getNextEntry(); entry != null; entry = archive.getNextEntry()) {
            unpack(archive, directory, entry.getName(), entry.isDirectory());
        }
    }

    private static void untar(InputStream stream, Path directory) throws IOException {
        TarArchiveInputStream archive = new TarArchiveInputStream(new GzipCompressorInputStream(stream));
        for (TarArchiveEntry entry = archive.getNextEntry(); entry != null; entry = archive.getNextEntry()) {
            String name = entry.getName();
            unpack(archive, directory, name.substring(name.indexOf('/') + 1), entry.isDirectory());
        }
    }

    private static void unpack(InputStream content, Path directory, String name, boolean isDirectory) throws IOException {
        Path target = directory.resolve(name).normalize();
        if (!target.startsWith(directory)) {
            throw new IOException("Entry outside of the archive's directory: " + name);
        }
        Files.createDirectories(isDirectory ? target : target.getParent());
        if (!isDirectory) {
            Files.copy(content, target, StandardCopyOption.REPLACE_EXISTING);
        }
    }
}
